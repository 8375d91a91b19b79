"""One request's KV on its way out: carries out what `Sending` (see states.py) asks for.

offer(…)      blocks are computed                ─┐
granted(…)    the receiver granted a ticket       ├─▶ step ─▶ one sender's open, send, finish, aclose at a time
alive()       the receiver gave a sign of life   ─┘
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence

from kvstore.transfer.base import BlockMemory, Grant, KVSender, TransferStats
from kvstore.transfer.journal import TransferEntry
from kvstore.transfer.senders import KVSenders
from kvstore.transfer.states import (
    HEARTBEAT_S,
    LEASE_S,
    Abandon,
    Alive,
    Close,
    Done,
    Failed,
    Failure,
    FinishSending,
    Granted,
    Open,
    Ready,
    Release,
    Send,
    Sending,
    SendingAction,
    SendingEvent,
    TellFailed,
    Tick,
)
from pdmesh.errors import InternalError, MeshError, UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.tasks import settled
from pdmesh.transfers import Direction, Outcome


class Shipment:
    """Everything is called on one event loop. `aclose` in any case; the blocks may be reused only then.

    Args:
        memory: Where the blocks lie.
        senders: Of this worker.
        request_id: To which tickets are bound.
        receiver_id: The worker at the other end.
        on_failed: Told of each grant that came to nothing: its number, and why.
    """

    def __init__(
        self,
        memory: BlockMemory,
        senders: KVSenders,
        request_id: str,
        receiver_id: str,
        on_failed: Callable[[int, MeshError], None],
    ) -> None:
        self._memory = memory
        self._senders = senders
        self._request_id = request_id
        self._receiver_id = receiver_id
        self._on_failed = on_failed
        self._now = Sending(expires_at=time.monotonic() + LEASE_S)
        self._grants: dict[int, Grant] = {}
        self._block_ids: Sequence[int] = ()
        self._block_hashes: Sequence[BlockHash] = ()
        # Of the current grant.
        self._sender: KVSender | None = None
        self._entry: TransferEntry | None = None
        # What is under way, and who waits for it.
        self._work: asyncio.Task[None] | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._stats: TransferStats | None = None
        self._released = asyncio.Event()
        self._ticking = asyncio.create_task(self._tick())

    # What happens to it.

    def offer(self, block_ids: Sequence[int], block_hashes: Sequence[BlockHash], *, last: bool) -> None:
        """These blocks, of those that travel and from the first on, are computed; with `last` there will be no more."""
        self._block_ids, self._block_hashes = block_ids, block_hashes
        self._step(Ready(len(block_ids), last))

    def granted(self, number: int, grant: Grant) -> None:
        """The receiver granted a ticket, its `number`th; it takes the place of those before."""
        self._grants[number] = grant
        self._step(Granted(number))

    def alive(self) -> None:
        """The receiver gave a sign of life."""
        self._step(Alive())

    async def wait(self) -> TransferStats:
        """Returns when the receiver has verified every byte. Raises MeshError where it was given up."""
        await self._released.wait()
        if self._stats is None:
            assert self._now.failure is not None
            raise self._now.failure.error()
        return self._stats

    async def aclose(self) -> None:
        """Gives up what is not finished; returns when nobody here reads the blocks any more. Idempotent."""
        self._ticking.cancel()
        self._step(Abandon(Failure(UnavailableError, "TRANSFER_ABORTED", "the sender gave the transfer up")))
        await settled(asyncio.ensure_future(self._released.wait()))

    # Carrying out.

    def _step(self, event: SendingEvent) -> None:
        self._now, actions = self._now.step(event, time.monotonic())
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: SendingAction) -> None:
        match action:
            case Open():
                self._begin(self._open(self._grants.pop(action.grant)))
            case Send():
                self._begin(self._send(action.first, action.end))
            case FinishSending():
                self._begin(self._finish())
            case Close():
                if self._work is None:
                    self._begin(_given_up())
                else:
                    # Reports that it failed, if it has not succeeded already.
                    self._work.cancel()
            case TellFailed():
                self._on_failed(action.grant, action.failure.error())
            case Release():
                self._released.set()

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        self._work = asyncio.create_task(work)
        self._reporting = asyncio.create_task(self._report(self._work))

    async def _report(self, work: asyncio.Task[None]) -> None:
        """Reports how it went, once nobody reads blocks for a grant that is over."""
        await asyncio.wait([work])
        event = _outcome(work)
        if event != Done() or not self._now.goes_on:
            await self._close_sender(event)
        self._work = None
        self._step(event)

    async def _close_sender(self, event: Done | Failed) -> None:
        """Ends the current grant's transfer, and what the journal says of it."""
        sender, self._sender = self._sender, None
        entry, self._entry = self._entry, None
        if sender is not None:
            await sender.aclose()
        if entry is None:
            return
        if self._stats is not None:
            entry.end(Outcome.DONE, self._stats.num_bytes, self._stats.num_parts, self._stats.duration_s)
        else:
            error = event.failure.error() if isinstance(event, Failed) else _given_up_error()
            entry.fail(error, num_bytes=0, num_parts=0, duration_s=0.0)

    async def _open(self, grant: Grant) -> None:
        num_blocks = len(self._block_ids)
        self._entry = self._senders.journal.begin(
            Direction.SENDING, self._request_id, self._receiver_id, grant.transport, num_blocks,
            num_blocks * self._memory.block_bytes,
        )  # fmt: skip
        self._sender = self._senders.sender(grant, self._request_id, self._memory)
        await self._sender.open()

    async def _send(self, first: int, end: int) -> None:
        assert self._sender is not None
        block_ids = self._block_ids[first:end]
        if self._entry is not None:
            self._entry.first_byte()
            self._entry.state = f"sent {first} of {len(self._block_ids)} blocks that are computed"
        self._memory.to_host(block_ids)
        await self._sender.send(first, block_ids, self._block_hashes[first:end])

    async def _finish(self) -> None:
        assert self._sender is not None
        self._stats = await self._sender.finish()

    async def _tick(self) -> None:
        while not self._now.ended:
            await asyncio.sleep(HEARTBEAT_S)
            self._step(Tick())


def _given_up_error() -> MeshError:
    return UnavailableError("the transfer was given up", reason="TRANSFER_ABORTED", stage="transfer")


async def _given_up() -> None:
    raise _given_up_error()


def _outcome(work: asyncio.Task[None]) -> Done | Failed:
    if work.cancelled():
        return Failed(Failure.of(_given_up_error()))
    error = work.exception()
    if error is None:
        return Done()
    return Failed(Failure.of(error if isinstance(error, MeshError) else InternalError(f"sending failed: {error!r}")))
