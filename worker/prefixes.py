"""Brings a prompt's beginning into the engine's cache from where that is cheaper than computing it.

    in the cache already ─ own tiers: host memory, disk ─ another worker or a store ─ computed
    ◀─────────────── the run of the prompt's full blocks, from its first token on ───────────▶

Blocks that are brought are committed and let go: they lie in the cache like any other, for the prompt that comes next
to find, and are lost to nobody but time. Nothing here can make a request fail: what cannot be brought is computed.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from engine.api import BlockLease, Engine
from kvstore.exchange.fetching import BlockFetcher
from kvstore.tiers.base import Tier
from kvstore.tiers.stack import TierStack
from pdmesh.errors import InvalidRequestError, MeshError, UnavailableError
from pdmesh.hashing import BlockHash, block_hashes, root_hash
from pdmesh.tasks import settled
from pdmesh.types import KVSource
from worker.costs import DISK, HOST, Speeds, cheapest

log = logging.getLogger(__name__)

# A source may take so many times as long as computing, and never less than this: then computing has long been better.
_PATIENCE = 2.0
_PATIENCE_S = 0.5

_ORIGINS = {Tier.HOST: HOST, Tier.DISK: DISK}


def has_whole_blocks(engine: Engine) -> bool:
    """Whether all of each block lies in this process's memory: tiers and stores, which are one memory, take no less."""
    return len(engine.kv_nodes) == 1


class Prefixes:
    """See the module.

    Args:
        engine: Whose cache it is.
        tiers: This worker's, once it has any.
        fetcher: From others.
        speeds: What was measured; learns from what is brought.
    """

    def __init__(
        self, engine: Engine, tiers: Callable[[], TierStack | None], fetcher: BlockFetcher, speeds: Speeds
    ) -> None:
        self._engine = engine
        self._tiers = tiers
        self._fetcher = fetcher
        self._speeds = speeds
        # By the first block that is on its way: two prompts with one beginning bring it once.
        self._bringing: dict[BlockHash, asyncio.Event] = {}

    async def bring(self, token_ids: Sequence[int], cache_salt: bytes, sources: Sequence[KVSource] = ()) -> None:
        """Returns when what is worth bringing of a prompt's full blocks is in the cache; its last token stays over."""
        if (self._tiers() is None and not sources) or not has_whole_blocks(self._engine):
            return
        size = self._engine.facts.block_size
        num_usable = (len(token_ids) - 1) // size
        await self.bring_blocks(block_hashes(token_ids[: num_usable * size], size, root_hash(cache_salt)), sources)

    async def bring_blocks(self, hashes: Sequence[BlockHash], sources: Sequence[KVSource] = ()) -> None:
        """As `bring`, for a run of blocks."""
        while True:
            lease = await self._engine.acquire_blocks(hashes)
            try:
                if lease.num_cached_blocks == len(hashes):
                    return
                missing = hashes[lease.num_cached_blocks]
                under_way = self._bringing.get(missing)
                if under_way is None:
                    arrived = self._bringing[missing] = asyncio.Event()
                    try:
                        await self._bring(lease, hashes, sources)
                    finally:
                        del self._bringing[missing]
                        arrived.set()
                    return
            finally:
                await self._engine.release(lease)
            await under_way.wait()

    async def _bring(self, lease: BlockLease, hashes: Sequence[BlockHash], sources: Sequence[KVSource]) -> None:
        tiers = self._tiers()
        num_cached = lease.num_cached_blocks
        missing = hashes[num_cached:]
        plan = cheapest(
            self._speeds,
            num_missing=len(missing),
            own=[_ORIGINS[tier] for tier in tiers.locate(missing)] if tiers is not None else (),
            sources=[(source.worker_id, source.num_blocks - num_cached) for source in sources],
            block_bytes=self._engine.memory.block_bytes,
            block_size=self._engine.facts.block_size,
        )
        try:
            if plan.num_own and tiers is not None:
                num_loaded = await self._load(tiers, lease, missing[: plan.num_own])
                if num_loaded < plan.num_own:
                    return
            if plan.source is not None:
                await self._fetch(sources[plan.source], lease, hashes)
        except MeshError as error:
            log.warning("KV is computed that was to be brought: %s", error.message, extra={"reason": error.reason})

    async def _load(self, tiers: TierStack, lease: BlockLease, hashes: Sequence[BlockHash]) -> int:
        """Brings blocks from this worker's tiers; returns how many of them were good."""
        origin = _ORIGINS[max(tiers.locate(hashes), key=list(Tier).index, default=Tier.HOST)]
        num_cached = len(lease.block_ids)
        await self._engine.reserve(lease, len(hashes))
        block_ids = lease.block_ids[num_cached:]
        memory = self._engine.memory
        began = time.monotonic()
        loading = asyncio.get_running_loop().run_in_executor(
            None, tiers.load, hashes, [memory.view(block_id) for block_id in block_ids]
        )
        # Also when cancelled: the thread writes into blocks that are given back next.
        await settled(loading)
        num_loaded = loading.result()
        memory.to_device(block_ids[:num_loaded])
        await self._engine.commit(lease, num_cached, hashes[:num_loaded])
        self._speeds.note_load(origin, num_loaded * memory.block_bytes, time.monotonic() - began)
        return num_loaded

    async def _fetch(self, source: KVSource, lease: BlockLease, hashes: Sequence[BlockHash]) -> None:
        """Brings what `source` has beyond the lease's blocks."""
        num_held = len(lease.block_ids)

        async def reserve(num_blocks: int) -> Sequence[int]:
            await self._engine.reserve(lease, num_blocks)
            # From here on it is the source that is waited for.
            compute_s = self._speeds.compute_s(num_blocks * self._engine.facts.block_size)
            limit.reschedule(asyncio.get_running_loop().time() + max(_PATIENCE_S, _PATIENCE * compute_s))
            return lease.block_ids[num_held:]

        began = time.monotonic()
        try:
            async with asyncio.timeout(None) as limit:
                stats = await self._fetcher.fetch(source, self._engine.facts, hashes, num_held, reserve)
        except TimeoutError as error:
            self._speeds.note_failure(source.worker_id)
            raise UnavailableError(
                f"{source.worker_id} sends slower than this worker computes", reason="SOURCE_SLOW", stage="transfer"
            ) from error
        except InvalidRequestError:
            # This worker's own cache is too small: no fault of the source's.
            raise
        except MeshError:
            self._speeds.note_failure(source.worker_id)
            raise
        if stats is None:
            return
        block_ids = lease.block_ids[num_held:]
        self._engine.memory.to_device(block_ids)
        await self._engine.commit(lease, num_held, hashes[num_held : num_held + len(block_ids)])
        self._speeds.note_load(source.worker_id, stats.num_bytes, time.monotonic() - began)
