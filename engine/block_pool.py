"""Who holds which KV block, and which blocks hold the KV of which tokens. Ids only: the bytes are KVCache's.

A block's life:

    free ──allocate──▶ reserved ──commit──▶ committed ──free──▶ free, still found by its hash ──allocate──▶ …
                          │                     ▲                           │
                          └──free──▶ free       └────────acquire────────────┘

Only committed blocks are found by `lookup` and told of in events; a block that is being written is nobody else's.
Blocks that are free but still cached are reused last, the least recently used first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engine.api import BlockEvents
from pdmesh.errors import InternalError
from pdmesh.hashing import BlockHash


class BlockPool:
    """Reference counts, free queue and prefix index of `num_blocks` blocks.

    Every block returned by `allocate` or taken by `acquire` is to be freed once. Not thread-safe.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        # Next to be reused first. A dict that remembers its order: a queue with removal from the middle in O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._index: dict[BlockHash, int] = {}
        self._evicted: list[tuple[int, BlockHash]] = []
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, whether or not something is cached in them."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that `lookup` can find, held or free."""
        return len(self._index)

    def lookup(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The committed blocks of the longest known run that begins `hashes`. Holds nothing: acquire them at once."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._index.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_free_among(self, block_ids: Sequence[int]) -> int:
        """How many of `block_ids` would leave the free queue if they were acquired."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Adds a holder to committed blocks that `lookup` just returned."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes free blocks to write to, forgetting what was cached in them. There must be enough."""
        if num_blocks > len(self._free):
            raise InternalError(f"allocating {num_blocks} blocks where {len(self._free)} are free")
        block_ids = []
        for _ in range(num_blocks):
            block_id, _ = self._free.popitem(last=False)
            block_hash = self._hashes[block_id]
            if block_hash is not None:
                self._evicted.append((block_id, block_hash))
                self._forget(block_id, block_hash)
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def commit(self, block_id: int, block_hash: BlockHash) -> None:
        """Offers a held block, whose KV is complete and stays as it is, to the prefix index.

        Where another block has this hash already, that one stays in the index and this one is its holder's alone.
        """
        if self._ref_counts[block_id] == 0:
            raise InternalError(f"committing block {block_id}, which nobody holds")
        if block_hash in self._index:
            return
        if self._hashes[block_id] is not None:
            raise InternalError(f"committing block {block_id} under a second hash")
        self._index[block_hash] = block_id
        self._hashes[block_id] = block_hash
        self._stored[block_hash] = None

    def free(self, block_ids: Sequence[int]) -> None:
        """Takes away one holder of each block. Raises InternalError for a block that has none.

        Pass a sequence's blocks first to last: its last block is reused before its first one, without which the
        others could not be found.
        """
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] == 0:
                raise InternalError(f"block {block_id} is freed twice")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def drain_evicted(self) -> list[tuple[int, BlockHash]]:
        """Blocks allocated since the last call that still hold the KV of another use, and its hash.

        Whoever wants to keep that KV copies it before anybody writes to the blocks.
        """
        evicted, self._evicted = self._evicted, []
        return evicted

    def drain_events(self) -> BlockEvents:
        """What changed in the prefix index since the last call."""
        events = BlockEvents(tuple(self._stored), tuple(self._removed))
        self._stored.clear()
        self._removed.clear()
        return events

    def check_invariants(self) -> None:
        """Raises AssertionError where the pool contradicts itself. O(num_blocks)."""
        for block_id, count in enumerate(self._ref_counts):
            assert count >= 0, f"block {block_id} has {count} holders"
            assert (count == 0) == (block_id in self._free), f"block {block_id}: {count} holders, free or not?"
            block_hash = self._hashes[block_id]
            assert block_hash is None or self._index[block_hash] == block_id, f"block {block_id} is not where it says"
        assert len(self._free) <= self.num_blocks
        assert len(self._index) == sum(block_hash is not None for block_hash in self._hashes)
        assert self._stored.keys() <= self._index.keys(), "stored blocks that are not there"

    def check_holders(self, block_ids: Iterable[int]) -> None:
        """Raises AssertionError unless exactly these hold the blocks: each id once for each of its holders."""
        counts = [0] * self.num_blocks
        for block_id in block_ids:
            counts[block_id] += 1
        differing = [block_id for block_id, count in enumerate(counts) if count != self._ref_counts[block_id]]
        assert not differing, f"blocks {differing[:8]} have other holders than their count says"

    def _forget(self, block_id: int, block_hash: BlockHash) -> None:
        del self._index[block_hash]
        self._hashes[block_id] = None
        # What was stored and removed since the last drain was never told, and need not be.
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None
