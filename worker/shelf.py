"""A worker's cache and tiers, as others fetch from them."""

from collections.abc import Callable, Sequence

from engine.api import BlockLease, Engine
from kvstore.transfer.base import BlockMemory
from pdmesh.errors import UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.types import PairingFacts
from worker.memory import EngineMemory
from worker.prefixes import Prefixes, has_whole_blocks


class EngineShelf:
    """Implements kvstore.exchange.shelf.Shelf. What lies in a lower tier is brought into the cache first.

    Args:
        engine: Has the cache.
        facts: The engine's; None while it loads, when nothing may be asked of it.
        prefixes: Bring what lies lower.
    """

    def __init__(self, engine: Engine, facts: Callable[[], PairingFacts | None], prefixes: Prefixes) -> None:
        self._engine = engine
        self._facts = facts
        self._prefixes = prefixes
        self.memory: BlockMemory = EngineMemory(engine)

    @property
    def facts(self) -> PairingFacts | None:
        return self._facts()

    async def hold(self, hashes: Sequence[BlockHash]) -> "LeasedBlocks":
        if self.facts is None:
            raise UnavailableError("this worker loads its model and has no KV yet", reason="WORKER_LOADING")
        if not has_whole_blocks(self._engine):
            return LeasedBlocks(self._engine, BlockLease())
        await self._prefixes.bring_blocks(hashes)
        lease = await self._engine.acquire_blocks(hashes)
        self.memory.to_host(lease.block_ids)
        return LeasedBlocks(self._engine, lease)


class LeasedBlocks:
    """Implements HeldBlocks."""

    def __init__(self, engine: Engine, lease: BlockLease) -> None:
        self._engine = engine
        self._lease = lease

    @property
    def block_ids(self) -> Sequence[int]:
        return self._lease.block_ids

    async def aclose(self) -> None:
        await self._engine.release(self._lease)
