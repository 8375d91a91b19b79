"""Tickets: who may write which blocks, and what has arrived. No I/O; safe to call from several threads.

`Incoming` keeps one `Receiving` (see states.py) and carries out what its steps ask for. A writer brackets each write
into block memory with `writing`. `revoke` forbids further writes and stops the writer; once `wait_quiet` has returned,
no write is under way nor can one begin: the blocks may be given to somebody else.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvstore.transfer.base import BlockMemory
from kvstore.transfer.states import (
    LEASE_S,
    Abort,
    Alive,
    BeginWrite,
    Ended,
    EndWrite,
    Fail,
    Failure,
    Finish,
    Quiet,
    Receiving,
    ReceivingEvent,
    Redeem,
    Refuse,
    StopWriter,
    Tick,
    TransferState,
)
from pdmesh.errors import MeshError, TicketError, UnavailableError
from pdmesh.hashing import BlockHash

TICKET_BYTES = 16


class Incoming:
    """One ticket and what came under it.

    Args:
        request_id: Of the request whose KV is awaited.
        epoch: Of the attempt.
        sender_incarnation: The one process that may redeem it.
        block_ids: Where the blocks go, by their place in the ticket.
        block_hashes: Identity of each.
        memory: In which the blocks, or the slices of them that are awaited, lie.
        on_begin: Called once, from any thread, when the ticket is redeemed.
        on_end: Called once, from any thread, when it is DONE or FAILED.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        request_id: str,
        epoch: int,
        sender_incarnation: str,
        block_ids: Sequence[int],
        block_hashes: Sequence[BlockHash],
        memory: BlockMemory,
        on_begin: Callable[[], None],
        on_end: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert len(set(block_ids)) == len(block_ids), "a block can be written under one place of a ticket only"
        assert len(block_hashes) == len(block_ids)
        self.ticket = secrets.token_bytes(TICKET_BYTES)
        self.block_ids = tuple(block_ids)
        self.memory = memory
        self._clock = clock
        self._now = Receiving(
            request_id, epoch, sender_incarnation, tuple(block_hashes), memory.block_bytes, expires_at=clock() + LEASE_S
        )
        self._on_begin = on_begin
        self._on_end = on_end
        self._stop_writer: Callable[[], None] = _nothing
        self._changed = threading.Condition()

    # What it is now; a snapshot each.

    @property
    def state(self) -> TransferState:
        return self._now.state

    @property
    def num_bytes(self) -> int:
        return self._now.num_bytes

    @property
    def num_parts(self) -> int:
        return self._now.num_parts

    @property
    def error(self) -> MeshError | None:
        return self._now.failure.error() if self._now.failure is not None else None

    @property
    def expires_at(self) -> float:
        """When the lease ends if the sender gives no sign of life until then, by `clock`."""
        return self._now.expires_at

    @property
    def quiet(self) -> bool:
        """It has ended, and nobody writes."""
        return self._now.quiet

    # What happens to it.

    def redeem(self, epoch: int, request_id: str, sender_incarnation: str, stop_writer: Callable[[], None]) -> None:
        """`stop_writer` makes the writer give up, whatever it waits for. Raises TicketError: see `TicketTable`."""
        with self._changed:
            self._step(Redeem(epoch, request_id, sender_incarnation))
            self._stop_writer = stop_writer
        self._on_begin()

    @contextmanager
    def writing(self, first: int, offset_bytes: int, num_bytes: int, block_hash: bytes) -> Iterator[None]:
        """Brackets the writing and verifying of one part; it counts as arrived if the block succeeds.

        Args:
            first: Block, by its place in the ticket, in which the part begins.
            offset_bytes: In that block.
            num_bytes: Of the part; it may go on over the blocks that follow.
            block_hash: Identity, at the sender, of the last block that it touches.

        Raises TicketError if revoked, CorruptionError for a part that lies outside, came before or is of other tokens.
        """
        begin = first * self._now.block_bytes + offset_bytes
        self._step(BeginWrite(begin, begin + num_bytes, block_hash))
        arrived = 0
        try:
            yield
            arrived = num_bytes
        finally:
            self._step(EndWrite(arrived))

    def finish(self, num_parts: int, num_bytes: int) -> None:
        """The sender says that this was all. Raises CorruptionError if it was not."""
        self._step(Finish(num_parts, num_bytes))

    def fail(self, error: MeshError) -> None:
        """The writer gives up; nothing happens if the transfer has ended."""
        self._step(Fail(Failure.of(error)))

    def revoke(self, error: MeshError | None = None) -> None:
        """The receiver wants no more: the writer is stopped; nothing happens if the transfer has ended."""
        aborted = UnavailableError("the receiver gave the transfer up", reason="TRANSFER_ABORTED", stage="transfer")
        self._step(Abort(Failure.of(error or aborted)))

    def alive(self) -> None:
        """The sender gave a sign of life."""
        self._step(Alive())

    def tick(self) -> None:
        """Fails the transfer if the sender's lease is over."""
        self._step(Tick())

    def wait_quiet(self) -> None:
        """Blocks until it has ended and nobody writes."""
        with self._changed:
            self._changed.wait_for(lambda: self._now.quiet)

    def check_invariants(self) -> None:
        """Raises AssertionError where the books do not add up; callable at any time."""
        self._now.check_invariants()

    def _step(self, event: ReceivingEvent) -> None:
        """Raises what the event is refused with."""
        with self._changed:
            self._now, actions = self._now.step(event, self._clock())
            stop_writer = self._stop_writer
            if self._now.ended:
                self._stop_writer = _nothing
        # Outside the lock: what is called may take other locks.
        for action in actions:
            match action:
                case Refuse():
                    raise action.failure.error()
                case StopWriter():
                    stop_writer()
                case Ended():
                    self._on_end()
                case Quiet():
                    with self._changed:
                        self._changed.notify_all()


def _nothing() -> None:
    """Stops a writer that is not there."""


class TicketTable:
    """The tickets of one receiving process. A ticket lives from `issue` to `drop`.

    They are found by Python's keyed hash of all their bytes: how long a wrong guess takes says nothing of a right one.

    Args:
        on_refused: Told of the transport over which somebody came without leave; from any thread.
    """

    def __init__(self, on_refused: Callable[[str], None] = lambda transport: None) -> None:
        self._on_refused = on_refused
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
        self,
        ticket: bytes,
        epoch: int,
        request_id: str,
        sender_incarnation: str,
        transport: str,
        stop_writer: Callable[[], None],
    ) -> Incoming:
        """Begins the transfer that `ticket` allows. Raises TicketError; a wrong claim does not use the ticket up."""
        with self._lock:
            incoming = self._incoming.get(ticket)
        try:
            if incoming is None:
                raise TicketError("no such ticket", reason="TICKET_UNKNOWN", stage="transfer")
            incoming.redeem(epoch, request_id, sender_incarnation, stop_writer)
        except TicketError:
            self._on_refused(transport)
            raise
        return incoming
