"""A router's side of the directory: polls it and tells a listener what changed.

The directory is a hint. While it cannot be reached the last view stands. A worker that is missing from a directory
that answers is gone only after `expiry_s` of answered time: a store that was restarted empty holds nobody until the
workers come again, a heartbeat later. A worker that said it leaves, or that was replaced by a new incarnation, is
gone at the next poll.

    each poll:  registrations -> worker_seen / worker_gone
                snapshots of workers newly seen, or with a gap in their events -> blocks_reset
                events of the others -> blocks_removed, blocks_stored, tier by tier
"""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.directory import (
    BlockEvent,
    Directory,
    DirectoryUnavailableError,
    Registration,
    TieredBlocks,
    WorkerRef,
)
from kvstore.tiers.base import Tier
from pdmesh.hashing import BlockHash
from pdmesh.types import WorkerInfo

log = logging.getLogger(__name__)

# Replaced incarnations remembered, so that a predecessor that wakes up again is not believed.
MAX_REPLACED = 1024
# Polls further apart than this many intervals were held up here: that time does not count against workers.
MAX_COUNTED_INTERVALS = 4


class WatchListener(Protocol):
    """What a watcher tells, on the event loop, in order. Must not raise."""

    def worker_seen(self, info: WorkerInfo) -> None:
        """A worker is new, or what it says of itself has changed (its load, mostly)."""
        ...

    def worker_gone(self, worker_id: str, incarnation: str, reason: str) -> None:
        """A worker has left, vanished or been replaced; nothing more is told of this incarnation's blocks."""
        ...

    def blocks_stored(self, worker_id: str, hashes: Sequence[BlockHash], tier: Tier) -> None:
        """These blocks lie in `tier` now, wherever they were before."""
        ...

    def blocks_removed(self, worker_id: str, hashes: Sequence[BlockHash]) -> None:
        """The worker has these blocks no more, in no tier."""
        ...

    def blocks_reset(self, worker_id: str, held: TieredBlocks) -> None:
        """These blocks, and no others, are what the worker holds."""
        ...


@dataclass(eq=False, slots=True)
class _Watched:
    """A worker as of the last poll.

    Attributes:
        absent_s: Answered time since it was last registered.
        seq: The last event told; -1 before the first snapshot.
        joined: Whether event seq + 1 can follow. If not, a later snapshot is needed.
    """

    info: WorkerInfo
    seen_at: float
    absent_s: float = 0.0
    seq: int = -1
    joined: bool = False


class Watcher:
    """See the module.

    Args:
        directory: Read, never written; not closed here.
        listener: Told what changes.
        poll_s: Between two polls.
        expiry_s: How long a worker may be missing from a directory that answers.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        directory: Directory,
        listener: WatchListener,
        poll_s: float = 0.25,
        expiry_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._listener = listener
        self._poll_s = poll_s
        self._expiry_s = expiry_s
        self._clock = clock
        self._workers: dict[str, _Watched] = {}
        self._replaced: OrderedDict[WorkerRef, None] = OrderedDict()
        self._reachable = False
        self._outage_logged = False
        self._polled_at = clock()
        self._task: asyncio.Task[None] | None = None

    @property
    def reachable(self) -> bool:
        """Whether the directory answered the last poll."""
        return self._reachable

    def age_s(self, worker_id: str) -> float:
        """Seconds since a poll last found the worker registered; infinite if it is not known."""
        worker = self._workers.get(worker_id)
        return self._clock() - worker.seen_at if worker is not None else math.inf

    async def start(self) -> None:
        """Polls once, whether or not the directory answers, and goes on polling."""
        assert self._task is None, "started twice"
        await self.poll()
        self._task = asyncio.create_task(self._run(), name="watcher")

    async def stop(self) -> None:
        """Stops polling; idempotent. Nothing is told any more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def poll(self) -> None:
        """Reads the directory once and tells what changed; `start` calls this by itself. Never raises for an outage."""
        try:
            self._apply_registrations(await self._directory.registrations())
            await self._join()
            await self._follow()
        except DirectoryUnavailableError as error:
            self._reachable = False
            if not self._outage_logged:
                self._outage_logged = True
                log.warning("directory unreachable, the last view of it stands: %s", error.message)
        else:
            self._reachable = True
            if self._outage_logged:
                self._outage_logged = False
                log.info("directory reachable again")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.poll()
            except Exception:
                log.exception("a poll of the directory failed: a defect of ours; polling goes on")

    def _apply_registrations(self, registrations: Sequence[Registration]) -> None:
        now = self._clock()
        # Time counts as answered only between two polls that were both answered.
        answered_s = min(now - self._polled_at, MAX_COUNTED_INTERVALS * self._poll_s) if self._reachable else 0.0
        self._polled_at = now
        missing = set(self._workers)
        for registration in registrations:
            ref, info = registration.ref, registration.info
            known = self._workers.get(ref.worker_id)
            if ref in self._replaced:
                continue
            if info is None:
                if known is not None and WorkerRef.of(known.info) == ref:
                    missing.discard(ref.worker_id)
                    self._drop(ref.worker_id, "it left")
                continue
            missing.discard(ref.worker_id)
            self._apply_info(ref, info, known, now)
        for worker_id in missing:
            worker = self._workers[worker_id]
            worker.absent_s += answered_s
            if worker.absent_s >= self._expiry_s:
                self._drop(worker_id, f"not registered for {worker.absent_s:.1f} s")

    def _apply_info(self, ref: WorkerRef, info: WorkerInfo, known: _Watched | None, now: float) -> None:
        if known is not None and WorkerRef.of(known.info) != ref:
            self._remember_replaced(WorkerRef.of(known.info))
            self._drop(ref.worker_id, f"replaced by incarnation {ref.incarnation}")
            known = None
        if known is None:
            self._workers[ref.worker_id] = _Watched(info, now)
            self._listener.worker_seen(info)
            return
        known.seen_at, known.absent_s = now, 0.0
        if known.info != info:
            known.info = info
            self._listener.worker_seen(info)

    def _remember_replaced(self, ref: WorkerRef) -> None:
        self._replaced[ref] = None
        while len(self._replaced) > MAX_REPLACED:
            self._replaced.popitem(last=False)

    def _drop(self, worker_id: str, reason: str) -> None:
        worker = self._workers.pop(worker_id)
        self._listener.worker_gone(worker_id, worker.info.incarnation, reason)

    async def _join(self) -> None:
        """Starts from a snapshot where events alone do not do."""
        for worker_id, worker in list(self._workers.items()):
            if worker.joined:
                continue
            snapshot = await self._directory.snapshot(WorkerRef.of(worker.info))
            # One that is no later than what was told already would take back newer events.
            if snapshot is not None and snapshot.seq > worker.seq:
                worker.seq, worker.joined = snapshot.seq, True
                self._listener.blocks_reset(worker_id, snapshot.held)

    async def _follow(self) -> None:
        joined = {WorkerRef.of(worker.info): worker for worker in self._workers.values() if worker.joined}
        events = await self._directory.events({ref: worker.seq for ref, worker in joined.items()})
        for ref, worker in joined.items():
            for event in events.get(ref, ()):
                if event.seq != worker.seq + 1:
                    worker.joined = False
                    break
                worker.seq = event.seq
                self._tell(ref.worker_id, event)

    def _tell(self, worker_id: str, event: BlockEvent) -> None:
        if event.removed:
            self._listener.blocks_removed(worker_id, event.removed)
        for tier, hashes in event.stored.items():
            self._listener.blocks_stored(worker_id, hashes, tier)
