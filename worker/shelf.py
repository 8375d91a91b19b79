"""A worker's cache and tiers, as others fetch from them."""

from collections.abc import Sequence

from engine.api import BlockLease, Engine
from kvstore.transfer.base import BlockMemory
from pdmesh.hashing import BlockHash
from pdmesh.types import PairingFacts
from worker.memory import EngineMemory
from worker.prefixes import Prefixes


class EngineShelf:
    """Implements kvstore.exchange.shelf.Shelf. What lies in a lower tier is brought into the cache first."""

    def __init__(self, engine: Engine, prefixes: Prefixes) -> None:
        self._engine = engine
        self._prefixes = prefixes
        self.memory: BlockMemory = EngineMemory(engine)

    @property
    def facts(self) -> PairingFacts:
        return self._engine.facts

    async def hold(self, hashes: Sequence[BlockHash]) -> "LeasedBlocks":
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
