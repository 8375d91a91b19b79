"""Which worker has which KV blocks, so that a prompt goes where its beginning lies.

One map from block hash to a bit per worker: the longest cached prefixes on all workers come from one walk over a
prompt's hashes. A hint, never truth: workers decide for themselves what they have.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from pdmesh.hashing import BlockHash


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
        self._bits: dict[str, int] = {}
        # Bits of workers that left: they may still be set in the map, and count for nobody.
        self._retired = 0

    def __len__(self) -> int:
        return len(self._masks)

    def store(self, worker_id: str, hashes: Iterable[BlockHash]) -> None:
        """`worker_id` has these blocks now."""
        bit = self._bit(worker_id)
        masks = self._masks
        for block in hashes:
            masks[block] = masks.get(block, 0) | bit
            if len(masks) > self._max_blocks:
                self._shrink()
                masks = self._masks

    def remove(self, worker_id: str, hashes: Iterable[BlockHash]) -> None:
        """`worker_id` has these blocks no more."""
        bit = self._bits.get(worker_id, 0)
        masks = self._masks
        for block in hashes:
            mask = masks.get(block, 0)
            if mask & bit:
                if mask == bit:
                    del masks[block]
                else:
                    masks[block] = mask & ~bit

    def reset(self, worker_id: str, hashes: Iterable[BlockHash] = ()) -> None:
        """`worker_id` has exactly these blocks; by default none, and is forgotten."""
        self._retired |= self._bits.pop(worker_id, 0)
        if self._retired.bit_count() > self._MAX_RETIRED:
            self._sweep()
        hashes = list(hashes)
        if hashes:
            self.store(worker_id, hashes)

    def longest_prefixes(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """For each worker that has any: how many of `hashes`, from the first on, it has without a gap."""
        masks = self._masks
        live = 0
        for bit in self._bits.values():
            live |= bit
        # ends[i]: those whose prefix ends before block i.
        ended: list[tuple[int, int]] = []
        for length, block in enumerate(hashes):
            having = live & masks.get(block, 0)
            if having != live:
                ended.append((length, live & ~having))
                live = having
                if not live:
                    break
        else:
            ended.append((len(hashes), live))
        lengths = {bit: length for length, mask in ended if length for bit in _single_bits(mask)}
        return {worker_id: lengths[bit] for worker_id, bit in self._bits.items() if bit in lengths}

    def _bit(self, worker_id: str) -> int:
        bit = self._bits.get(worker_id)
        if bit is None:
            used = self._retired
            for taken in self._bits.values():
                used |= taken
            # The lowest bit that is free.
            bit = self._bits[worker_id] = ~used & (used + 1)
        return bit

    def _sweep(self) -> None:
        keep = ~self._retired
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
