"""A worker's side of the directory: keeps its registration fresh and tells which KV blocks it holds.

One task does all writing, so what readers see is in order:

    heartbeat due, or kicked   -> put (registration, load)
    blocks changed             -> append_event, at most one event per EVENT_INTERVAL_S
    now and then, if changed   -> put_snapshot, from which new readers start
    store lost our state,
    or a write's fate unknown  -> put_snapshot, then one event, whose number makes every reader notice

A failed call means an outage: nothing is written until the next heartbeat, changes collect in one set of hashes
for each tier, and after the outage a snapshot tells all of it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from kvstore.directory import BlockEvent, BlockSnapshot, Directory, DirectoryUnavailableError, WorkerRef
from kvstore.tiers.base import Tier
from pdmesh.hashing import BlockHash
from pdmesh.types import WorkerInfo

log = logging.getLogger(__name__)

EVENT_INTERVAL_S = 0.05
SNAPSHOT_INTERVAL_S = 5.0
# Hashes in one event (64 KiB of them). A step that changes more is told by a snapshot.
MAX_EVENT_HASHES = 4096


class Announcer:
    """See the module. Everything is called on one event loop.

    Args:
        directory: Where to announce; not closed here.
        describe: The worker as it is now; its worker_id and incarnation never change. Cheap, must not raise.
        heartbeat_s: Between two registrations; well below the directory's time to live.
    """

    def __init__(self, directory: Directory, describe: Callable[[], WorkerInfo], heartbeat_s: float = 1.0) -> None:
        self._directory = directory
        self._describe = describe
        self._heartbeat_s = heartbeat_s
        self._held: dict[Tier, set[BlockHash]] = {tier: set() for tier in Tier}
        # Net changes since the last event: each hash's nearest tier now, None if it is gone. If there are too many, a
        # snapshot is due in their place.
        self._pending: dict[BlockHash, Tier | None] | None = {}
        self._seq = 0
        self._changed_since_snapshot = False
        self._next_beat = 0.0
        self._next_snapshot = 0.0
        self._outage = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Registers, and goes on doing so; returns after the first attempt, whether or not it succeeded."""
        assert self._task is None, "started twice"
        await self._write()
        self._task = asyncio.create_task(self._run(), name="announcer")

    async def stop(self) -> None:
        """Stops, and says in the directory that the worker leaves; idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        try:
            await self._directory.remove(WorkerRef.of(self._describe()))
        except DirectoryUnavailableError as error:
            log.info("left without saying so, the registration will expire: %s", error.message)

    def kick(self) -> None:
        """Announces the worker now, because its state changed."""
        self._next_beat = 0.0
        self._wake.set()

    def on_blocks(self, stored: Sequence[BlockHash], removed: Sequence[BlockHash], tier: Tier = Tier.POOL) -> None:
        """Takes note of what changed in one tier; `removed` applies before `stored`."""
        before = {block: self._nearest(block) for block in (*removed, *stored)}
        self._held[tier].difference_update(removed)
        self._held[tier].update(stored)
        changes = {block: now for block, was in before.items() if (now := self._nearest(block)) is not was}
        if not changes:
            return
        self._changed_since_snapshot = True
        if self._pending is not None:
            self._pending.update(changes)
            if len(self._pending) > MAX_EVENT_HASHES:
                self._pending = None
        if not self._outage:
            self._wake.set()

    async def _run(self) -> None:
        while True:
            # Time that passes here is what batches several steps into one event.
            await asyncio.sleep(EVENT_INTERVAL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._next_beat - time.monotonic())):
                    await self._wake.wait()
            self._wake.clear()
            await self._write()

    async def _write(self) -> None:
        """Writes all that is due. Whatever fails is logged, once per outage, and told again later."""
        try:
            if self._next_beat <= time.monotonic():
                self._next_beat = time.monotonic() + self._heartbeat_s
                info = self._describe()
                if not await self._directory.put(info):
                    self._pending = None
            elif self._outage:
                return
            await self._write_blocks(WorkerRef.of(self._describe()))
        except DirectoryUnavailableError as error:
            # Whether the write arrived is unknown: only a snapshot makes sure.
            self._pending = None
            if not self._outage:
                log.warning("directory unreachable, serving goes on: %s", error.message)
            self._outage = True
        except Exception:
            self._pending = None
            if not self._outage:
                log.exception("announcing failed, a defect of ours; serving goes on")
            self._outage = True
        else:
            if self._outage:
                log.info("directory reachable again")
            self._outage = False

    async def _write_blocks(self, ref: WorkerRef) -> None:
        if self._pending is None:
            await self._resynchronize(ref)
            return
        if self._pending:
            changes, self._pending = self._pending, {}
            self._seq += 1
            await self._directory.append_event(ref, _event(self._seq, changes))
        if self._changed_since_snapshot and self._next_snapshot <= time.monotonic():
            await self._write_snapshot(ref)

    async def _resynchronize(self, ref: WorkerRef) -> None:
        self._pending = {}
        # Two numbers on: readers of the old events find one missing, and the snapshot covers it.
        self._seq += 2
        await self._write_snapshot(ref)
        self._seq += 1
        await self._directory.append_event(ref, BlockEvent(self._seq))

    async def _write_snapshot(self, ref: WorkerRef) -> None:
        self._changed_since_snapshot = False
        self._next_snapshot = time.monotonic() + SNAPSHOT_INTERVAL_S
        held: dict[Tier, tuple[BlockHash, ...]] = {}
        nearer: list[set[BlockHash]] = []
        for tier, hashes in self._held.items():
            if nearest_here := hashes.difference(*nearer):
                held[tier] = tuple(nearest_here)
            nearer.append(hashes)
        await self._directory.put_snapshot(ref, BlockSnapshot(self._seq, held))

    def _nearest(self, block: BlockHash) -> Tier | None:
        for tier, hashes in self._held.items():
            if block in hashes:
                return tier
        return None


def _event(seq: int, changes: Mapping[BlockHash, Tier | None]) -> BlockEvent:
    blocks: dict[Tier | None, list[BlockHash]] = {}
    for block, tier in changes.items():
        blocks.setdefault(tier, []).append(block)
    removed = tuple(blocks.pop(None, ()))
    return BlockEvent(seq, {tier: tuple(hashes) for tier, hashes in blocks.items() if tier is not None}, removed)
