from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from engine.api import BlockEvents
from engine.block_pool import BlockPool
from pdmesh.errors import InternalError
from pdmesh.hashing import BlockHash


def h(name: int) -> BlockHash:
    return BlockHash(name.to_bytes(16, "little"))


def test_only_committed_blocks_are_found() -> None:
    pool = BlockPool(4)
    [first, second] = pool.allocate(2)
    assert pool.lookup([h(1)]) == []
    pool.commit(first, h(1))
    assert pool.lookup([h(1), h(2)]) == [first]
    pool.commit(second, h(2))
    assert pool.lookup([h(1), h(2), h(3)]) == [first, second]
    assert pool.lookup([h(3), h(1)]) == []


def test_cached_blocks_outlive_their_holder_and_are_reused_last() -> None:
    pool = BlockPool(3)
    [cached] = pool.allocate(1)
    pool.commit(cached, h(1))
    pool.free([cached])
    assert pool.num_free_blocks == 3
    assert cached not in pool.allocate(2)
    assert pool.lookup([h(1)]) == [cached]
    assert pool.allocate(1) == [cached]
    assert pool.lookup([h(1)]) == []


def test_the_least_recently_used_goes_first_and_a_sequence_from_its_end() -> None:
    pool = BlockPool(4)
    sequence, other = pool.allocate(3), pool.allocate(1)
    for index, block_id in enumerate(sequence + other):
        pool.commit(block_id, h(index))
    pool.free(sequence)
    pool.free(other)
    assert pool.allocate(4) == [*reversed(sequence), *other]


def test_a_shared_block_is_free_when_its_last_holder_leaves() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.commit(block, h(1))
    pool.acquire([block])
    pool.free([block])
    assert pool.num_free_blocks == 1
    pool.free([block])
    assert pool.num_free_blocks == 2


def test_acquiring_takes_a_cached_block_out_of_the_free_queue() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.commit(block, h(1))
    pool.free([block])
    assert pool.num_free_among([block]) == 1
    pool.acquire([block])
    assert pool.num_free_among([block]) == 0
    assert pool.num_free_blocks == 1
    assert block not in pool.allocate(1)


def test_a_second_block_of_one_hash_stays_its_holders_own() -> None:
    pool = BlockPool(2)
    [first, second] = pool.allocate(2)
    pool.commit(first, h(1))
    pool.commit(second, h(1))
    assert pool.lookup([h(1)]) == [first]
    pool.free([second])
    assert pool.lookup([h(1)]) == [first]
    pool.check_invariants()


def test_misuse_raises() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    with pytest.raises(InternalError, match="allocating 2 blocks where 1 are free"):
        pool.allocate(2)
    pool.free([block])
    with pytest.raises(InternalError, match="freed twice"):
        pool.free([block])
    with pytest.raises(InternalError, match="nobody holds"):
        pool.commit(block, h(1))


def test_events_tell_the_difference_since_the_last_ones() -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.commit(block, h(1))
    assert pool.drain_events() == BlockEvents(stored=(h(1),))
    pool.free([block])
    assert pool.drain_events() == BlockEvents()
    # Reused, stored under another hash, and that one reused before anybody was told.
    pool.allocate(1)
    pool.commit(block, h(2))
    pool.free([block])
    pool.allocate(1)
    assert pool.drain_events() == BlockEvents(removed=(h(1),))


def test_holders_are_compared_with_counts() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.check_holders([block])
    with pytest.raises(AssertionError):
        pool.check_holders([])


class PoolAgainstModel(RuleBasedStateMachine):
    """Random operations on a pool of 6 blocks, beside a model that keeps plain lists and searches them."""

    holdings = Bundle("holdings")

    @initialize()
    def start(self) -> None:
        self.pool = BlockPool(6)
        self.held: Counter[int] = Counter()
        self.committed: dict[BlockHash, int] = {}
        self.listener: set[BlockHash] = set()

    @rule(target=holdings, count=st.integers(0, 6))
    def allocate(self, count: int) -> object:
        num_free = 6 - len(self.held)
        if count > num_free:
            with pytest.raises(InternalError):
                self.pool.allocate(count)
            return multiple()
        block_ids = self.pool.allocate(count)
        assert len(set(block_ids)) == count
        assert not any(block_id in self.held for block_id in block_ids)
        self.held.update(block_ids)
        self.committed = {name: block for name, block in self.committed.items() if block not in block_ids}
        return block_ids

    @rule(block_ids=holdings, index=st.integers(0, 5), name=st.integers(0, 9))
    def commit(self, block_ids: list[int], index: int, name: int) -> None:
        if index >= len(block_ids) or block_ids[index] in self.committed.values():
            return
        self.pool.commit(block_ids[index], h(name))
        self.committed.setdefault(h(name), block_ids[index])

    @rule(target=holdings, names=st.lists(st.integers(0, 9), max_size=4))
    def share(self, names: list[int]) -> list[int]:
        expected = []
        for name in names:
            if h(name) not in self.committed:
                break
            expected.append(self.committed[h(name)])
        assert self.pool.lookup([h(name) for name in names]) == expected
        self.pool.acquire(expected)
        self.held.update(expected)
        return expected

    @rule(block_ids=consumes(holdings))
    def free(self, block_ids: list[int]) -> None:
        self.pool.free(block_ids)
        self.held = +(self.held - Counter(block_ids))

    @rule()
    def listen(self) -> None:
        events = self.pool.drain_events()
        self.listener = (self.listener - set(events.removed)) | set(events.stored)
        assert self.listener == set(self.committed)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_invariants()
        self.pool.check_holders(self.held.elements())
        assert self.pool.num_free_blocks == 6 - len(self.held)
        assert self.pool.num_cached_blocks == len(self.committed)


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
