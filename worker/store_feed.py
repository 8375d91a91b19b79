"""Gives the cluster's stores what was computed here, for others to fetch."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

from engine.api import Engine
from kvstore.directory import Directory, DirectoryUnavailableError
from kvstore.exchange.putting import BlockPutter
from pdmesh.errors import MeshError
from pdmesh.hashing import BlockHash
from pdmesh.types import Role, WorkerInfo, WorkerState
from worker.prefixes import has_whole_blocks

log = logging.getLogger(__name__)

# Between two looks for stores.
LOOK_INTERVAL_S = 2.0
# Prompts that wait to be given; older ones are passed over, since what is new is asked for soonest.
MAX_WAITING = 32


class StoreFeed:
    """One prompt at a time, beside the requests. Start it once the engine runs.

    Args:
        engine: Has the blocks.
        directory: Says which stores there are.
        putter: Gives them.
    """

    def __init__(self, engine: Engine, directory: Directory, putter: BlockPutter) -> None:
        self._engine = engine
        self._directory = directory
        self._putter = putter
        self._waiting: asyncio.Queue[Sequence[BlockHash]] = asyncio.Queue()
        self._stores: list[WorkerInfo] = []
        self._looked_at = -LOOK_INTERVAL_S
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="store-feed")

    async def aclose(self) -> None:
        """Stops, also in the middle of a prompt. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def offer(self, hashes: Sequence[BlockHash]) -> None:
        """These blocks, a prompt's from its first on, are in the cache now."""
        if hashes and has_whole_blocks(self._engine):
            while self._waiting.qsize() >= MAX_WAITING:
                self._waiting.get_nowait()
            self._waiting.put_nowait(hashes)

    async def _run(self) -> None:
        while True:
            hashes = await self._waiting.get()
            try:
                await self._give(hashes)
            except MeshError as error:
                log.info("a store did not take KV: %s", error.message, extra={"reason": error.reason})
            except Exception:
                log.exception("giving KV to a store failed, a defect of ours; serving goes on")

    async def _give(self, hashes: Sequence[BlockHash]) -> None:
        await self._look_for_stores()
        if not self._stores:
            return
        # Prompts with one beginning go to one store, whoever computed them.
        store = self._stores[int.from_bytes(hashes[0][:4]) % len(self._stores)]
        lease = await self._engine.acquire_blocks(hashes)
        try:
            memory, block_ids = self._engine.memory, list(lease.block_ids)
            await self._putter.put(
                store.worker_id, store.address, self._engine.facts, memory, block_ids, hashes[: len(block_ids)]
            )
        finally:
            await self._engine.release(lease)

    async def _look_for_stores(self) -> None:
        if time.monotonic() - self._looked_at < LOOK_INTERVAL_S:
            return
        self._looked_at = time.monotonic()
        with contextlib.suppress(DirectoryUnavailableError):
            infos = [registration.info for registration in await self._directory.registrations()]
            stores = [i for i in infos if i is not None and i.role is Role.STORE and i.state is WorkerState.READY]
            self._stores = sorted(stores, key=lambda info: info.worker_id)
