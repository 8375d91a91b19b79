"""The prefix index against a dumb model: for each worker, the tier of each hash."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from kvstore.tiers.base import Tier
from pdmesh.hashing import BlockHash
from router.index import CachedPrefix, PrefixIndex

BLOCKS = [BlockHash(bytes([n]) * 16) for n in range(12)]
workers = st.sampled_from([f"w{n}" for n in range(5)])
tiers = st.sampled_from(Tier)
blocks = st.lists(st.sampled_from(BLOCKS), max_size=12)


class IndexMachine(RuleBasedStateMachine):
    """Room for all: nothing is forgotten unasked."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[str, dict[BlockHash, Tier]] = defaultdict(dict)

    @rule(worker=workers, hashes=blocks, tier=tiers)
    def store(self, worker: str, hashes: list[BlockHash], tier: Tier) -> None:
        self.index.store(worker, hashes, tier)
        self.held[worker].update(dict.fromkeys(hashes, tier))

    @rule(worker=workers, hashes=blocks)
    def remove(self, worker: str, hashes: list[BlockHash]) -> None:
        self.index.remove(worker, hashes)
        for block in hashes:
            self.held[worker].pop(block, None)

    @rule(worker=workers, held=st.dictionaries(st.sampled_from(BLOCKS), tiers))
    def reset(self, worker: str, held: dict[BlockHash, Tier]) -> None:
        by_tier = defaultdict(list)
        for block, tier in held.items():
            by_tier[tier].append(block)
        self.index.reset(worker, by_tier)
        self.held[worker] = dict(held)

    @rule(hashes=blocks)
    def longest(self, hashes: list[BlockHash]) -> None:
        expected = {}
        for worker, held in self.held.items():
            length = next((i for i, block in enumerate(hashes) if block not in held), len(hashes))
            if length:
                num_pool = sum(held[block] is Tier.POOL for block in hashes[:length])
                expected[worker] = CachedPrefix(length, num_pool)
        assert self.index.longest_prefixes(hashes) == expected


TestIndex = IndexMachine.TestCase


def numbered(count: int, start: int = 0) -> list[BlockHash]:
    return [BlockHash(n.to_bytes(16, "little")) for n in range(start, start + count)]


@given(st.integers(1, 50), st.lists(st.integers(1, 80), min_size=1, max_size=8))
def test_memory_is_bounded_and_what_came_last_stays(max_blocks: int, counts: list[int]) -> None:
    index, start = PrefixIndex(max_blocks), 0
    for count in counts:
        index.store("w", numbered(count, start))
        start += count
        assert len(index) <= max_blocks
    if max_blocks > 1:
        assert index.longest_prefixes(numbered(1, start - 1)) == {"w": CachedPrefix(1, 1)}


def test_workers_that_left_give_their_place_to_others() -> None:
    index = PrefixIndex()
    for life in range(500):
        index.store(f"w{life}", numbered(20))
        assert index.longest_prefixes(numbered(20)) == {f"w{life}": CachedPrefix(20, 20)}
        index.reset(f"w{life}")
        assert index.longest_prefixes(numbered(20)) == {}
    # Nobody is left: what the dead had goes at the latest when some more have died.
    assert len(index) <= 20


def test_one_worker_of_many_ends_first() -> None:
    index = PrefixIndex()
    index.store("short", numbered(3))
    index.store("long", numbered(9))
    index.store("gap", [*numbered(2), *numbered(4, 5)])
    index.store("far", numbered(6), Tier.HOST)
    index.store("far", numbered(2, 1))
    index.store("near", numbered(8))
    index.store("near", numbered(5, 4), Tier.DISK)
    assert index.longest_prefixes(numbered(10)) == {
        "short": CachedPrefix(3, 3),
        "long": CachedPrefix(9, 9),
        "gap": CachedPrefix(2, 2),
        "far": CachedPrefix(6, 2),
        "near": CachedPrefix(9, 4),
    }
    assert index.longest_prefixes([]) == {}
