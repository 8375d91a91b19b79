"""Which worker has which KV blocks, so that a prompt goes where its beginning lies.

One map from block hash to two bits per worker, that it has the block and that it has it in its pool: the longest cached
prefixes on all workers come from one walk over a prompt's hashes. A hint, never truth: workers decide for themselves
what they have.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from kvstore.tiers.base import Tier
from pdmesh.hashing import BlockHash


class CachedPrefix(NamedTuple):
    """The leading blocks of a prompt that a worker has without a gap, and how many of these lie in its pool."""

    num_blocks: int
    num_pool_blocks: int


class PrefixIndex:
    """See the module. Owned by one event loop.

    Args:
        max_blocks: Distinct hashes held, about 150 bytes each; when more come, the half that came first goes.
    """

    # A worker's bit is cleared from the map when so many have left, in one pass: each pass looks at every block.
    _MAX_RETIRED = 32

    def __init__(self, max_blocks: int = 1 << 20) -> None:
        self._max_blocks = max_blocks
        self._masks: dict[BlockHash, int] = {}
        # Each worker's bit for "has it"; the next higher one says "in its pool", and is set only beside it.
        self._bits: dict[str, int] = {}
        # The same bits of workers that left: they may still be set in the map, and count for nobody.
        self._retired = 0

    def __len__(self) -> int:
        return len(self._masks)

    def store(self, worker_id: str, hashes: Iterable[BlockHash], tier: Tier = Tier.POOL) -> None:
        """`worker_id` has these blocks in `tier` now, wherever they were before."""
        bit = self._bit(worker_id)
        pool_bit = bit << 1
        others, ours = ~pool_bit, bit | pool_bit if tier is Tier.POOL else bit
        masks = self._masks
        for block in hashes:
            masks[block] = masks.get(block, 0) & others | ours
            if len(masks) > self._max_blocks:
                self._shrink()
                masks = self._masks

    def remove(self, worker_id: str, hashes: Iterable[BlockHash]) -> None:
        """`worker_id` has these blocks no more."""
        bit = self._bits.get(worker_id, 0)
        others = ~(bit | bit << 1)
        masks = self._masks
        for block in hashes:
            mask = masks.get(block, 0)
            if mask & bit:
                if mask & others:
                    masks[block] = mask & others
                else:
                    del masks[block]

    def reset(self, worker_id: str, held: Mapping[Tier, Iterable[BlockHash]] | None = None) -> None:
        """`worker_id` has exactly these blocks; by default none, and is forgotten."""
        self._retired |= self._bits.pop(worker_id, 0)
        if self._retired.bit_count() > self._MAX_RETIRED:
            self._sweep()
        for tier, hashes in (held or {}).items():
            self.store(worker_id, hashes, tier)

    def longest_prefixes(self, hashes: Sequence[BlockHash]) -> dict[str, CachedPrefix]:
        """For each worker that has any: how many of `hashes`, from the first on, it has without a gap."""
        masks = self._masks
        live = 0
        for bit in self._bits.values():
            live |= bit
        # With each length: those whose prefix has it.
        ended: list[tuple[int, int]] = []
        # Who has this block, but not in its pool; and how many such blocks each prefix has: less the place where a run
        # of them begins, plus the place where it ends.
        outside = 0
        num_outside: dict[int, int] = {}
        previous = -1
        for length, block in enumerate(hashes):
            mask = masks.get(block, 0)
            if mask == previous:
                # As most often: blocks of one prompt come and go together.
                continue
            previous = mask
            having = live & mask
            changed = outside ^ (having & ~(mask >> 1))
            if changed:
                outside ^= changed
                for bit in _single_bits(changed):
                    num_outside[bit] = num_outside.get(bit, 0) + (-length if outside & bit else length)
            if having != live:
                ended.append((length, live & ~having))
                live = having
                if not live:
                    break
        else:
            ended.append((len(hashes), live))
        prefixes: dict[int, CachedPrefix] = {}
        for length, mask in ended:
            if length:
                prefixes.update(dict.fromkeys(_single_bits(mask), CachedPrefix(length, length)))
        for bit, count in num_outside.items():
            length = prefixes[bit].num_blocks
            prefixes[bit] = CachedPrefix(length, length - count - (length if outside & bit else 0))
        return {worker_id: prefixes[bit] for worker_id, bit in self._bits.items() if bit in prefixes}

    def _bit(self, worker_id: str) -> int:
        bit = self._bits.get(worker_id)
        if bit is None:
            used = self._retired
            for taken in self._bits.values():
                used |= taken
            used |= used << 1
            # The lowest bit that is free, and the next one with it.
            bit = self._bits[worker_id] = ~used & (used + 1)
        return bit

    def _sweep(self) -> None:
        keep = ~(self._retired | self._retired << 1)
        self._masks = {block: mask & keep for block, mask in self._masks.items() if mask & keep}
        self._retired = 0

    def _shrink(self) -> None:
        self._sweep()
        surplus = len(self._masks) - self._max_blocks // 2
        if surplus > 0:
            self._masks = dict(islice(self._masks.items(), surplus, None))


def _single_bits(mask: int) -> Iterable[int]:
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
