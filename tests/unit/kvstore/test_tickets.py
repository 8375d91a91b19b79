"""Tickets: who may redeem them, and the books of what arrived, against a dumb model of one flag per byte."""

import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.transfer.states import LEASE_S, TransferState
from kvstore.transfer.tickets import Incoming, TicketTable
from pdmesh.errors import CorruptionError, MeshError, TicketError, UnavailableError
from tests.kv_endpoints import BytesMemory, hash_of, hashes

BLOCK_BYTES = 12
NUM_BLOCKS = 3


def make_incoming(
    num_blocks: int = NUM_BLOCKS,
    on_end: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = lambda: 0.0,
) -> Incoming:
    block_ids = range(10, 10 + num_blocks)
    return Incoming(
        "request",
        1,
        "sender",
        block_ids,
        hashes(num_blocks),
        BytesMemory(10 + num_blocks, BLOCK_BYTES),
        nothing,
        on_end,
        clock,
    )


def redeem(incoming: Incoming) -> None:
    incoming.redeem(1, "request", "sender", nothing)


def nothing() -> None:
    return


class IncomingAgainstBytes(RuleBasedStateMachine):
    """Parts of any range, some failing their check, and at any time an end."""

    @initialize()
    def begin(self) -> None:
        self.num_ends = 0
        self.num_stops = 0
        self.incoming = make_incoming(on_end=self.count_end)
        self.incoming.redeem(1, "request", "sender", self.count_stop)
        self.claimed = [False] * NUM_BLOCKS * BLOCK_BYTES
        self.num_arrived = 0
        self.num_parts = 0

    def count_end(self) -> None:
        self.num_ends += 1

    def count_stop(self) -> None:
        self.num_stops += 1

    @rule(
        index=st.integers(-1, NUM_BLOCKS),
        offset=st.integers(-1, BLOCK_BYTES),
        num_bytes=st.integers(0, 2 * BLOCK_BYTES),
        other_tokens=st.sampled_from([False, False, False, True]),
        intact=st.booleans(),
    )
    def write(self, index: int, offset: int, num_bytes: int, other_tokens: bool, intact: bool) -> None:
        begin = index * BLOCK_BYTES + offset
        end = begin + num_bytes
        last_block = (end - 1) // BLOCK_BYTES
        if self.incoming.state is not TransferState.RECEIVING:
            expected = "TICKET_REVOKED"
        elif not 0 <= begin < end <= len(self.claimed):
            expected = "KV_OUT_OF_RANGE"
        elif other_tokens:
            expected = "KV_WRONG_BLOCK"
        elif any(self.claimed[begin:end]):
            expected = "KV_DUPLICATED"
        else:
            expected = "" if intact else "KV_CORRUPTED"
        block_hash = hash_of(max(0, last_block) + other_tokens)
        outcome = ""
        try:
            with self.incoming.writing(index, offset, num_bytes, block_hash):
                self.claimed[begin:end] = [True] * num_bytes
                if not intact:
                    raise CorruptionError("checksum")
        except MeshError as error:
            outcome = error.reason
        assert outcome == expected
        if not outcome:
            self.num_arrived += num_bytes
            self.num_parts += 1

    @precondition(lambda self: self.incoming.state is TransferState.RECEIVING)
    @rule(missing=st.integers(0, 1))
    def finish(self, missing: int) -> None:
        complete = self.num_arrived == NUM_BLOCKS * BLOCK_BYTES and not missing
        outcome = ""
        try:
            self.incoming.finish(self.num_parts - missing, self.num_arrived)
        except CorruptionError as error:
            outcome = error.reason
        assert outcome == ("" if complete else "KV_INCOMPLETE")

    @rule(revoked=st.booleans())
    def end(self, revoked: bool) -> None:
        ended_before = self.incoming.state in (TransferState.DONE, TransferState.FAILED)
        stops_before = self.num_stops
        if revoked:
            self.incoming.revoke()
        else:
            self.incoming.fail(UnavailableError("lost"))
        # The writer is stopped by others, once, and never told to stop by itself.
        assert self.num_stops - stops_before == (revoked and not ended_before)

    @invariant()
    def books_add_up(self) -> None:
        self.incoming.check_invariants()
        assert self.incoming.quiet == (self.incoming.state is not TransferState.RECEIVING)
        assert self.incoming.num_bytes == self.num_arrived
        assert self.num_ends == (self.incoming.state in (TransferState.DONE, TransferState.FAILED))


TestIncomingAgainstBytes = IncomingAgainstBytes.TestCase
TestIncomingAgainstBytes.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@given(st.permutations([(index, offset) for index in range(2) for offset in range(0, BLOCK_BYTES, 3)]))
def test_any_order_completes_and_ranges_join(order: list[tuple[int, int]]) -> None:
    incoming = make_incoming(2)
    redeem(incoming)
    for index, offset in order:
        with pytest.raises(CorruptionError, match="arrived"):
            incoming.finish(incoming.num_parts, incoming.num_bytes)
        with incoming.writing(index, offset, 3, hash_of(index)):
            pass
        incoming.check_invariants()
    incoming.finish(8, 2 * BLOCK_BYTES)
    assert incoming.state is TransferState.DONE


def issued() -> tuple[TicketTable, Incoming]:
    table, incoming = TicketTable(), make_incoming()
    table.issue(incoming)
    table.check_invariants()
    return table, incoming


def test_a_ticket_is_redeemed_once() -> None:
    table, incoming = issued()
    assert table.redeem(incoming.ticket, 1, "request", "sender", "tcp", nothing) is incoming
    with pytest.raises(TicketError) as refused:
        table.redeem(incoming.ticket, 1, "request", "sender", "tcp", nothing)
    assert refused.value.reason == "TICKET_USED"
    table.check_invariants()


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ((bytes(16), 1, "request", "sender"), "TICKET_UNKNOWN"),
        ((b"", 1, "request", "sender"), "TICKET_UNKNOWN"),
        ((None, 2, "request", "sender"), "TICKET_EPOCH"),
        ((None, 1, "other", "sender"), "TICKET_SENDER"),
        ((None, 1, "request", "other"), "TICKET_SENDER"),
    ],
)
def test_a_wrong_claim_is_refused_and_does_not_use_the_ticket_up(
    claim: tuple[bytes | None, int, str, str], reason: str
) -> None:
    table, incoming = issued()
    ticket, epoch, request_id, sender = claim
    with pytest.raises(TicketError) as refused:
        table.redeem(incoming.ticket if ticket is None else ticket, epoch, request_id, sender, "tcp", nothing)
    assert refused.value.reason == reason
    assert table.redeem(incoming.ticket, 1, "request", "sender", "tcp", nothing) is incoming


def test_a_revoked_ticket_is_worth_nothing() -> None:
    table, incoming = issued()
    incoming.revoke()
    with pytest.raises(TicketError):
        table.redeem(incoming.ticket, 1, "request", "sender", "tcp", nothing)
    table.drop(incoming)
    table.drop(incoming)
    assert len(table) == 0


def test_revoking_all_ends_each_with_the_reason() -> None:
    table, (first, second) = TicketTable(), (make_incoming(), make_incoming())
    for incoming in (first, second):
        table.issue(incoming)
    table.revoke_all(UnavailableError("stopping", reason="STOPPING"))
    for incoming in (first, second):
        assert isinstance(incoming.error, UnavailableError)
        assert (incoming.error.reason, incoming.error.message) == ("STOPPING", "stopping")
    assert len(table) == 2, "whoever expects them drops them"
    table.check_invariants()


def test_tickets_differ() -> None:
    assert len({make_incoming().ticket for _ in range(100)}) == 100


def test_one_of_many_redeemers_wins() -> None:
    table, incoming = issued()
    won: list[Incoming] = []
    lost: list[str] = []
    start = threading.Barrier(8)

    def try_to_redeem() -> None:
        start.wait()
        try:
            won.append(table.redeem(incoming.ticket, 1, "request", "sender", "tcp", nothing))
        except TicketError as error:
            lost.append(error.reason)

    threads = [threading.Thread(target=try_to_redeem) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [incoming]
    assert lost == ["TICKET_USED"] * 7


def test_waiting_for_quiet_lasts_as_long_as_a_write() -> None:
    incoming = make_incoming()
    redeem(incoming)
    waiting = threading.Thread(target=incoming.wait_quiet)
    with incoming.writing(0, 0, BLOCK_BYTES, hash_of(0)):
        incoming.revoke()
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
    waiting.join(5.0)
    assert not waiting.is_alive()
    with pytest.raises(TicketError), incoming.writing(1, 0, BLOCK_BYTES, hash_of(1)):
        pytest.fail("a revoked ticket allowed a write")


def test_a_sender_without_a_sign_of_life_loses_its_lease() -> None:
    now = 100.0
    incoming = make_incoming(clock=lambda: now)
    redeem(incoming)
    now += LEASE_S - 1
    incoming.tick()
    assert incoming.state is TransferState.RECEIVING
    incoming.alive()
    now += LEASE_S - 1
    with incoming.writing(0, 0, BLOCK_BYTES, hash_of(0)):
        pass
    now += LEASE_S - 1
    incoming.tick()
    assert incoming.state is TransferState.RECEIVING, "a part is a sign of life too"
    now += 1
    incoming.tick()
    assert incoming.error is not None
    assert incoming.error.reason == "LEASE_EXPIRED"
    assert incoming.quiet
