"""Directories that tests can make fail, and what stands around one: a worker, its announcer, a router's view."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from kvstore.announcer import Announcer
from kvstore.directory import (
    Directory,
    TieredBlocks,
    WorkerRef,
)
from kvstore.memory_directory import MemoryDirectory
from kvstore.redis_directory import RedisDirectory
from kvstore.tiers.base import Tier
from kvstore.watcher import Watcher
from pdmesh.hashing import BlockHash
from pdmesh.types import Load, ModelInfo, PairingFacts, Role, WorkerInfo, WorkerState
from tests.valkey import ValkeyServer

CLUSTER = "test"
# How long a test waits for what must happen soon; it fails only by never happening.
PATIENCE_S = 10.0

FACTS = PairingFacts("digest", "float32", "float32", 16, 2, 1, 8, "layer,kv,head,token,dim")
WORKER = WorkerInfo(
    worker_id="prefill-0", incarnation="a1", role=Role.PREFILL, state=WorkerState.READY, address="10.0.0.1:7000",
    facts=FACTS, model=ModelInfo("tiny", "llama", 1000, 512), load=Load(1, 2, 3, 100, 90),
)  # fmt: skip
REF = WorkerRef.of(WORKER)


def block(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


def blocks(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(block(number) for number in numbers)


def pool(*numbers: int) -> TieredBlocks:
    return {Tier.POOL: blocks(*numbers)}


class Store(Protocol):
    """Where directories keep what they are told; can be made to fail."""

    def directory(self, ttl_s: float = 3.0) -> Directory: ...
    def go_down(self) -> None: ...
    def come_up_empty(self) -> None: ...


class MemoryStore:
    def __init__(self) -> None:
        self._directory: MemoryDirectory | None = None

    def directory(self, ttl_s: float = 3.0) -> MemoryDirectory:
        if self._directory is None:
            self._directory = MemoryDirectory(ttl_s)
        return self._directory

    def go_down(self) -> None:
        self.directory().reachable = False

    def come_up_empty(self) -> None:
        self.directory().lose_everything()
        self.directory().reachable = True


class ValkeyStore:
    def __init__(self, server: ValkeyServer) -> None:
        self.server = server

    def directory(self, ttl_s: float = 3.0) -> RedisDirectory:
        return RedisDirectory(self.server.url, CLUSTER, ttl_s)

    def go_down(self) -> None:
        self.server.kill()

    def come_up_empty(self) -> None:
        self.server.start()


class View:
    """A listener that keeps what a router would, and what it was told in order."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerInfo] = {}
        self.seen: list[WorkerInfo] = []
        self.tiers: dict[str, dict[BlockHash, Tier]] = {}
        self.gone: list[tuple[str, str]] = []
        self.num_resets = 0

    @property
    def blocks(self) -> dict[str, set[BlockHash]]:
        """Each worker's blocks, wherever they lie."""
        return {worker_id: set(tiers) for worker_id, tiers in self.tiers.items()}

    def worker_seen(self, info: WorkerInfo) -> None:
        self.workers[info.worker_id] = info
        self.seen.append(info)
        self.tiers.setdefault(info.worker_id, {})

    def worker_gone(self, worker_id: str, incarnation: str, reason: str) -> None:
        assert self.workers.pop(worker_id).incarnation == incarnation
        assert reason
        del self.tiers[worker_id]
        self.gone.append((worker_id, incarnation))

    def blocks_stored(self, worker_id: str, hashes: Sequence[BlockHash], tier: Tier) -> None:
        self.tiers[worker_id].update(dict.fromkeys(hashes, tier))

    def blocks_removed(self, worker_id: str, hashes: Sequence[BlockHash]) -> None:
        for block in hashes:
            self.tiers[worker_id].pop(block, None)

    def blocks_reset(self, worker_id: str, held: TieredBlocks) -> None:
        self.tiers[worker_id] = {block: tier for tier, hashes in held.items() for block in hashes}
        self.num_resets += 1


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def announcing(directory: Directory, info: WorkerInfo = WORKER) -> AsyncIterator[Announcer]:
    announcer = Announcer(directory, lambda: info, heartbeat_s=0.1)
    await announcer.start()
    try:
        yield announcer
    finally:
        await announcer.stop()


@asynccontextmanager
async def watching(directory: Directory, view: View) -> AsyncIterator[Watcher]:
    watcher = Watcher(directory, view, poll_s=0.02)
    await watcher.start()
    try:
        yield watcher
    finally:
        await watcher.stop()
