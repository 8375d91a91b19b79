"""Tickets: who may write which blocks, and what has arrived. No I/O; safe to call from several threads.

    issued ──redeem──▶ TRANSFERRING ──every byte verified──▶ DONE
      │                     │
      └───── fail / revoke ─┴──▶ FAILED

A writer brackets each write into block memory with `writing`. `revoke` forbids further writes and stops the writer;
once `wait_quiet` has returned, no write is under way nor can one begin: the blocks may be given to somebody else.
"""

import secrets
import threading
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

from pdmesh.errors import CorruptionError, MeshError, TicketError, UnavailableError

TICKET_BYTES = 16


class TransferState(Enum):
    WAITING = "waiting"
    TRANSFERRING = "transferring"
    DONE = "done"
    FAILED = "failed"


class Incoming:
    """One ticket and what came under it.

    Args:
        request_id: Of the request whose KV is awaited.
        epoch: Of the attempt.
        sender_incarnation: The one process that may redeem it.
        block_ids: Where the blocks go, by their place in the ticket.
        block_bytes: Size of each.
        on_end: Called once, from any thread, when it is DONE or FAILED.
    """

    def __init__(
        self,
        request_id: str,
        epoch: int,
        sender_incarnation: str,
        block_ids: Sequence[int],
        block_bytes: int,
        on_end: Callable[[], None],
    ) -> None:
        assert len(set(block_ids)) == len(block_ids), "a block can be written under one place of a ticket only"
        self.ticket = secrets.token_bytes(TICKET_BYTES)
        self.request_id = request_id
        self.epoch = epoch
        self.sender_incarnation = sender_incarnation
        self.block_ids = tuple(block_ids)
        self.num_parts = 0
        self.num_bytes = 0
        self.error: MeshError | None = None
        self._block_bytes = block_bytes
        self._state = TransferState.WAITING
        self._on_end = on_end
        # Per block: begins and ends of the ranges claimed, sorted and disjoint.
        self._claims: list[list[int]] = [[] for _ in self.block_ids]
        self._stop_writer: Callable[[], None] = _nothing
        self._num_writing = 0
        self._changed = threading.Condition()

    @property
    def state(self) -> TransferState:
        return self._state

    @property
    def total_bytes(self) -> int:
        return len(self.block_ids) * self._block_bytes

    def begin(self, stop_writer: Callable[[], None]) -> None:
        """The ticket was redeemed. `stop_writer` makes the writer give up, whatever it waits for."""
        with self._changed:
            if self._state is not TransferState.WAITING:
                raise TicketError("this ticket was used or revoked", reason="TICKET_USED", stage="transfer")
            self._state = TransferState.TRANSFERRING
            self._stop_writer = stop_writer

    @contextmanager
    def writing(self, index: int, offset_bytes: int, num_bytes: int) -> Iterator[None]:
        """Brackets the writing and verifying of one range of the block at `index`; it counts as arrived if it succeeds.

        Raises TicketError if revoked, CorruptionError for a range that lies outside or came before.
        """
        with self._changed:
            if self._state is not TransferState.TRANSFERRING:
                raise TicketError("this ticket was revoked", reason="TICKET_REVOKED", stage="transfer")
            self._claim(index, offset_bytes, num_bytes)
            self._num_writing += 1
        arrived = 0
        try:
            yield
            arrived = num_bytes
        finally:
            with self._changed:
                self._num_writing -= 1
                self.num_bytes += arrived
                self._changed.notify_all()

    def _claim(self, index: int, offset_bytes: int, num_bytes: int) -> None:
        end = offset_bytes + num_bytes
        if not (0 <= index < len(self.block_ids) and 0 <= offset_bytes < end <= self._block_bytes):
            raise CorruptionError(
                f"bytes {offset_bytes} to {end} of block {index} lie outside the {len(self.block_ids)} blocks of "
                f"{self._block_bytes} bytes that this ticket covers",
                reason="KV_OUT_OF_RANGE",
                stage="transfer",
            )
        bounds = self._claims[index]
        place = bisect(bounds, offset_bytes)
        # An odd place is inside a range; so is the end, if another range begins before it.
        if place % 2 or (place < len(bounds) and bounds[place] < end):
            raise CorruptionError(f"bytes of block {index} came twice", reason="KV_DUPLICATED", stage="transfer")
        bounds[place:place] = (offset_bytes, end)
        if place + 2 < len(bounds) and bounds[place + 2] == end:
            del bounds[place + 1 : place + 3]
        if place and bounds[place - 1] == offset_bytes:
            del bounds[place - 1 : place + 1]

    def count_part(self) -> None:
        self.num_parts += 1

    def finish(self, num_parts: int, num_bytes: int) -> None:
        """The sender says that this was all. Raises CorruptionError if it was not."""
        with self._changed:
            if self._state is not TransferState.TRANSFERRING:
                raise TicketError("this ticket was revoked", reason="TICKET_REVOKED", stage="transfer")
            expected = (self.num_parts, self.total_bytes)
            if self.num_bytes != self.total_bytes or (num_parts, num_bytes) != expected:
                raise CorruptionError(
                    f"{self.num_bytes} of {self.total_bytes} bytes arrived, in {self.num_parts} parts; "
                    f"the sender speaks of {num_bytes} bytes in {num_parts} parts",
                    reason="KV_INCOMPLETE",
                    stage="transfer",
                )
            self._state = TransferState.DONE
            self._stop_writer = _nothing
        self._on_end()

    def fail(self, error: MeshError) -> None:
        """The writer gives up; nothing happens if the transfer has ended."""
        if self._end(error) is not None:
            self._on_end()

    def revoke(self, error: MeshError | None = None) -> None:
        """The receiver wants no more: the writer is stopped; nothing happens if the transfer has ended."""
        aborted = UnavailableError("the receiver gave the transfer up", reason="TRANSFER_ABORTED", stage="transfer")
        stop_writer = self._end(error or aborted)
        if stop_writer is not None:
            stop_writer()
            self._on_end()

    def _end(self, error: MeshError) -> Callable[[], None] | None:
        """What stops the writer; None if the transfer had ended before."""
        with self._changed:
            if self._state in (TransferState.DONE, TransferState.FAILED):
                return None
            self._state = TransferState.FAILED
            self.error = error
            stop_writer, self._stop_writer = self._stop_writer, _nothing
            return stop_writer

    @property
    def quiet(self) -> bool:
        """Nobody is writing. Once FAILED or DONE, nobody will."""
        return self._num_writing == 0

    def wait_quiet(self) -> None:
        """Blocks until nobody is writing."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_writing == 0)

    def check_invariants(self) -> None:
        """Raises AssertionError where the books do not add up; callable at any time."""
        with self._changed:
            claimed = 0
            for bounds in self._claims:
                assert len(bounds) % 2 == 0
                assert bounds == sorted(set(bounds)), "ranges are disjoint and joined where they touch"
                claimed += sum(bounds[1::2]) - sum(bounds[::2])
            assert 0 <= self.num_bytes <= claimed <= self.total_bytes
            assert (self.error is not None) == (self._state is TransferState.FAILED)
            if self._state is TransferState.DONE:
                assert self.num_bytes == self.total_bytes


def _nothing() -> None:
    """Stops a writer that is not there."""


class TicketTable:
    """The tickets of one receiving process. A ticket lives from `issue` to `drop`.

    They are found by Python's keyed hash of all their bytes: how long a wrong guess takes says nothing of a right one.
    """

    def __init__(self) -> None:
        self._incoming: dict[bytes, Incoming] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._incoming)

    def issue(self, incoming: Incoming) -> None:
        with self._lock:
            self._incoming[incoming.ticket] = incoming

    def drop(self, incoming: Incoming) -> None:
        """Forgets a ticket; idempotent."""
        with self._lock:
            self._incoming.pop(incoming.ticket, None)

    def revoke_all(self, error: MeshError) -> None:
        """Ends every transfer that has not ended; whoever expected them still drops the tickets."""
        with self._lock:
            open_now = list(self._incoming.values())
        for incoming in open_now:
            incoming.revoke(error)

    def check_invariants(self) -> None:
        """Raises AssertionError where the books do not add up; callable at any time."""
        with self._lock:
            for ticket, incoming in self._incoming.items():
                assert ticket == incoming.ticket
                assert len(ticket) == TICKET_BYTES
                incoming.check_invariants()

    def redeem(
        self, ticket: bytes, epoch: int, request_id: str, sender_incarnation: str, stop_writer: Callable[[], None]
    ) -> Incoming:
        """Begins the transfer that `ticket` allows. Raises TicketError; a wrong claim does not use the ticket up."""
        with self._lock:
            incoming = self._incoming.get(ticket)
        if incoming is None:
            raise TicketError("no such ticket", reason="TICKET_UNKNOWN", stage="transfer")
        if incoming.epoch != epoch:
            raise TicketError(
                f"this ticket is of epoch {incoming.epoch}, not {epoch}", reason="TICKET_EPOCH", stage="transfer"
            )
        if (incoming.request_id, incoming.sender_incarnation) != (request_id, sender_incarnation):
            raise TicketError("this ticket is somebody else's", reason="TICKET_SENDER", stage="transfer")
        incoming.begin(stop_writer)
        return incoming
