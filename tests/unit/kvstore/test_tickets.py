"""Tickets: who may redeem them, and the books of what arrived, against a dumb model of one flag per byte."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.transfer.tickets import Incoming, TicketTable, TransferState
from pdmesh.errors import CorruptionError, MeshError, TicketError, UnavailableError

BLOCK_BYTES = 12
NUM_BLOCKS = 3


def make_incoming(num_blocks: int = NUM_BLOCKS) -> Incoming:
    return Incoming("request", 1, "sender", range(10, 10 + num_blocks), BLOCK_BYTES, lambda: None)


def nothing() -> None:
    return


class IncomingAgainstBytes(RuleBasedStateMachine):
    """Parts of any range, some failing their check, and at any time an end."""

    @initialize()
    def begin(self) -> None:
        self.num_ends = 0
        self.num_stops = 0
        self.incoming = Incoming("request", 1, "sender", range(NUM_BLOCKS), BLOCK_BYTES, self.count_end)
        self.incoming.begin(self.count_stop)
        self.claimed = [[False] * BLOCK_BYTES for _ in range(NUM_BLOCKS)]
        self.num_arrived = 0
        self.num_parts = 0
        self.was_quiet = True

    def count_end(self) -> None:
        self.num_ends += 1

    def count_stop(self) -> None:
        self.num_stops += 1

    @rule(
        index=st.integers(-1, NUM_BLOCKS),
        offset=st.integers(-1, BLOCK_BYTES),
        num_bytes=st.integers(0, BLOCK_BYTES + 1),
        intact=st.booleans(),
    )
    def write(self, index: int, offset: int, num_bytes: int, intact: bool) -> None:
        inside = index in range(NUM_BLOCKS) and offset >= 0 and num_bytes > 0 and offset + num_bytes <= BLOCK_BYTES
        if self.incoming.state is not TransferState.TRANSFERRING:
            expected = "TICKET_REVOKED"
        elif not inside:
            expected = "KV_OUT_OF_RANGE"
        elif any(self.claimed[index][offset : offset + num_bytes]):
            expected = "KV_DUPLICATED"
        else:
            expected = "" if intact else "KV_CORRUPTED"
        outcome = ""
        try:
            with self.incoming.writing(index, offset, num_bytes):
                self.claimed[index][offset : offset + num_bytes] = [True] * num_bytes
                self.was_quiet = self.incoming.quiet
                if not intact:
                    raise CorruptionError("checksum")
        except MeshError as error:
            outcome = error.reason
        assert outcome == expected
        if not outcome:
            assert not self.was_quiet
            self.incoming.count_part()
            self.num_arrived += num_bytes
            self.num_parts += 1

    @precondition(lambda self: self.incoming.state is TransferState.TRANSFERRING)
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
        assert self.incoming.quiet
        assert self.incoming.num_bytes == self.num_arrived
        assert self.num_ends == (self.incoming.state in (TransferState.DONE, TransferState.FAILED))


TestIncomingAgainstBytes = IncomingAgainstBytes.TestCase
TestIncomingAgainstBytes.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@given(st.permutations([(index, offset) for index in range(2) for offset in range(0, BLOCK_BYTES, 3)]))
def test_any_order_completes_and_ranges_join(order: list[tuple[int, int]]) -> None:
    incoming = make_incoming(2)
    incoming.begin(nothing)
    for index, offset in order:
        with pytest.raises(CorruptionError, match="arrived"):
            incoming.finish(incoming.num_parts, incoming.num_bytes)
        with incoming.writing(index, offset, 3):
            pass
        incoming.count_part()
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
    assert table.redeem(incoming.ticket, 1, "request", "sender", nothing) is incoming
    with pytest.raises(TicketError) as refused:
        table.redeem(incoming.ticket, 1, "request", "sender", nothing)
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
        table.redeem(incoming.ticket if ticket is None else ticket, epoch, request_id, sender, nothing)
    assert refused.value.reason == reason
    assert table.redeem(incoming.ticket, 1, "request", "sender", nothing) is incoming


def test_a_revoked_ticket_is_worth_nothing() -> None:
    table, incoming = issued()
    incoming.revoke()
    with pytest.raises(TicketError):
        table.redeem(incoming.ticket, 1, "request", "sender", nothing)
    table.drop(incoming)
    table.drop(incoming)
    assert len(table) == 0


def test_revoking_all_ends_each_with_the_reason() -> None:
    table, (first, second) = TicketTable(), (make_incoming(), make_incoming())
    for incoming in (first, second):
        table.issue(incoming)
    reason = UnavailableError("stopping")
    table.revoke_all(reason)
    assert (first.error, second.error) == (reason, reason)
    assert len(table) == 2, "whoever expects them drops them"
    table.check_invariants()


def test_tickets_differ() -> None:
    assert len({make_incoming().ticket for _ in range(100)}) == 100


def test_one_of_many_redeemers_wins() -> None:
    table, incoming = issued()
    won: list[Incoming] = []
    lost: list[str] = []
    start = threading.Barrier(8)

    def redeem() -> None:
        start.wait()
        try:
            won.append(table.redeem(incoming.ticket, 1, "request", "sender", nothing))
        except TicketError as error:
            lost.append(error.reason)

    threads = [threading.Thread(target=redeem) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [incoming]
    assert lost == ["TICKET_USED"] * 7


def test_waiting_for_quiet_lasts_as_long_as_a_write() -> None:
    incoming = make_incoming()
    incoming.begin(nothing)
    waiting = threading.Thread(target=incoming.wait_quiet)
    with incoming.writing(0, 0, BLOCK_BYTES):
        incoming.revoke()
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
    waiting.join(5.0)
    assert not waiting.is_alive()
    with pytest.raises(TicketError), incoming.writing(1, 0, BLOCK_BYTES):
        pytest.fail("a revoked ticket allowed a write")
