"""Host memory: what is found, what makes room for what, and what reaches the writer."""

import threading

import pytest

from kvstore.tiers.base import Tier, TierChange
from kvstore.tiers.host import HostTier
from pdmesh.errors import InternalError
from pdmesh.hashing import BlockHash
from tests.tier_blocks import BLOCK_BYTES, block, content, empty_view, key, keys


def make_tier(num_blocks: int = 3) -> HostTier:
    return HostTier(num_blocks, BLOCK_BYTES)


def held(tier: HostTier, *numbers: int) -> list[int]:
    """Those of the blocks that are there, after a look at their bytes."""
    tier.check_invariants()
    slots = tier.pin(keys(*numbers))
    for block_hash, slot in slots.items():
        assert tier.view(slot) == content(block_hash)
    tier.unpin(list(slots.values()))
    return [n for n in numbers if key(n) in slots]


def test_a_block_that_was_put_is_read_back() -> None:
    tier = make_tier()
    assert tier.put(key(1), block(1))
    (slot,) = tier.pin([key(1)]).values()
    view = empty_view()
    tier.read(slot, view)
    assert view == block(1)
    with pytest.raises(AssertionError):
        tier.check_idle()
    tier.unpin([slot])
    tier.check_idle()


def test_the_least_recently_used_makes_room() -> None:
    tier = make_tier()
    for n in (1, 2, 3):
        tier.put(key(n), block(n))
    assert tier.put(key(1), block(1)), "a block that is here is used again"
    tier.put(key(4), block(4))
    assert held(tier, 1, 2, 3, 4) == [1, 3, 4]
    stats = tier.stats()
    assert (stats.num_blocks, stats.num_bytes, stats.num_slots) == (3, 3 * BLOCK_BYTES, 3)
    assert (stats.num_stored, stats.num_evicted, stats.num_dropped) == (4, 1, 0)
    assert (stats.num_hits, stats.num_misses) == (3, 1)


def test_the_last_block_of_a_run_leaves_before_the_first() -> None:
    tier = make_tier()
    for n in (1, 2, 3):
        tier.put(key(n), block(n))
    tier.unpin(list(tier.pin(keys(1, 2, 3)).values()))
    tier.put(key(4), block(4))
    assert held(tier, 1, 2, 3, 4) == [1, 2, 4]


def test_pinned_and_reserved_slots_stay_and_there_are_fewer() -> None:
    tier = make_tier()
    for n in (1, 2, 3):
        tier.put(key(n), block(n))
    pinned = list(tier.pin(keys(1, 9, 2)).values())
    reserved = tier.reserve(5)
    assert len(reserved) == 1
    assert tier.reserve(1) == []
    assert not tier.put(key(4), block(4))
    assert tier.stats().num_dropped == 1
    assert held(tier, 1, 2, 3, 4) == [1, 2]
    tier.release(reserved)
    tier.unpin(pinned)
    tier.check_idle()
    assert len(tier.reserve(5)) == 3


def test_a_block_is_found_when_it_is_committed_and_not_before() -> None:
    tier = make_tier()
    (slot,) = tier.reserve(1)
    tier.view(slot)[:] = block(1)
    assert key(1) not in tier
    assert tier.commit(slot, key(1), pin=True) == slot
    assert held(tier, 1) == [1]
    assert len(tier.reserve(5)) == 2, "the pinned one stays"


def test_a_block_that_came_twice_takes_one_slot() -> None:
    tier = make_tier()
    first, second = tier.reserve(2)
    tier.view(first)[:] = block(1)
    tier.commit(first, key(1))
    assert tier.commit(second, key(1), pin=True) == first
    assert held(tier, 1) == [1]
    assert tier.stats().num_blocks == 1
    tier.unpin([first])
    tier.check_idle()


def test_what_was_not_taken_cannot_be_given_back() -> None:
    tier = make_tier()
    (slot,) = tier.reserve(1)
    tier.release([slot])
    with pytest.raises(InternalError, match="not reserved"):
        tier.release([slot])
    with pytest.raises(InternalError, match="not reserved"):
        tier.commit(slot, key(1))
    with pytest.raises(InternalError, match="not pinned"):
        tier.unpin([slot])
    tier.check_invariants()


def test_written_blocks_make_room_before_unwritten_ones() -> None:
    tier = make_tier()
    tier.start_write_back()
    for n in (1, 2, 3):
        tier.put(key(n), block(n), written=n == 3)
    tier.put(key(4), block(4))
    assert held(tier, 1, 2, 3, 4) == [1, 2, 4]
    assert tier.stats().num_dropped == 0


def test_with_a_writer_that_does_nothing_the_oldest_is_dropped_and_nobody_waits() -> None:
    tier = make_tier()
    tier.start_write_back()
    for n in range(1, 6):
        assert tier.put(key(n), block(n))
    assert held(tier, 1, 2, 3, 4, 5) == [3, 4, 5]
    assert tier.stats().num_dropped == 2
    assert tier.stats().num_evicted == 0
    assert len(tier.reserve(3)) == 3
    tier.check_invariants()
    assert tier.wait_written(0.0) == 0


def test_the_writer_gets_the_oldest_first_and_holds_it_meanwhile() -> None:
    tier = make_tier(2)
    tier.start_write_back()
    tier.put(key(1), block(1))
    tier.put(key(2), block(2))
    taken = tier.take_unwritten()
    assert taken is not None
    block_hash, slot = taken
    assert block_hash == key(1)
    tier.put(key(3), block(3))
    assert held(tier, 1, 2, 3) == [1, 3]
    tier.finish_write(slot)
    tier.check_invariants()
    assert tier.wait_written(0.01) == 1
    second = tier.take_unwritten()
    assert second is not None
    assert second[0] == key(3)
    tier.finish_write(second[1])
    assert tier.wait_written(1.0) == 0
    tier.check_idle()


def test_the_writer_waits_for_a_block() -> None:
    tier = make_tier()
    tier.start_write_back()
    taken: list[tuple[BlockHash, int] | None] = []
    waiting = threading.Thread(target=lambda: taken.append(tier.take_unwritten()))
    waiting.start()
    tier.put(key(1), block(1))
    waiting.join(5.0)
    assert taken[0] is not None
    assert taken[0][0] == key(1)


def test_the_writer_is_let_go_when_there_is_to_be_no_more() -> None:
    tier = make_tier()
    tier.start_write_back()
    taken: list[tuple[BlockHash, int] | None] = []
    waiting = threading.Thread(target=lambda: taken.append(tier.take_unwritten()))
    waiting.start()
    waiting.join(0.02)
    assert waiting.is_alive()
    tier.stop_write_back()
    waiting.join(5.0)
    assert taken == [None]


def test_without_a_writer_nothing_waits_to_be_written() -> None:
    tier = make_tier(2)
    tier.start_write_back()
    tier.put(key(1), block(1))
    tier.stop_write_back()
    tier.put(key(2), block(2))
    assert tier.wait_written(0.0) == 0
    assert tier.take_unwritten() is None
    tier.put(key(3), block(3))
    assert held(tier, 1, 2, 3) == [2, 3]
    assert tier.stats().num_dropped == 0


def test_listeners_are_told_what_is_held_and_every_change() -> None:
    tier = make_tier(2)
    tier.put(key(1), block(1))
    told: list[TierChange] = []
    tier.subscribe(told.append)
    tier.put(key(2), block(2))
    tier.put(key(3), block(3))
    assert told == [
        TierChange(Tier.HOST, stored=(key(1),)),
        TierChange(Tier.HOST, stored=(key(2),)),
        TierChange(Tier.HOST, removed=(key(1),)),
        TierChange(Tier.HOST, stored=(key(3),)),
    ]


def test_a_listener_that_fails_or_calls_back_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    tier = make_tier(2)
    told: list[TierChange] = []

    def fail(change: TierChange) -> None:
        if change.stored == (key(1),):
            tier.put(key(2), block(2))
        raise RuntimeError("listener")

    tier.subscribe(fail)
    tier.subscribe(told.append)
    tier.put(key(1), block(1))
    assert [change.stored for change in told] == [(), (key(1),), (key(2),)]
    assert "a listener to the host tier failed" in caplog.text


def test_threads_that_put_and_read_at_once_never_see_wrong_bytes() -> None:
    tier = HostTier(8, BLOCK_BYTES)
    seen: dict[BlockHash, bool] = {}
    told: list[TierChange] = []
    wrong: list[BlockHash] = []
    tier.subscribe(told.append)

    def work(worker: int) -> None:
        for step in range(200):
            n = (step * 7 + worker * 3) % 20
            tier.put(key(n), block(n))
            slots = tier.pin(keys(n, (n + 1) % 20))
            wrong.extend(block_hash for block_hash, slot in slots.items() if tier.view(slot) != content(block_hash))
            tier.unpin(list(slots.values()))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tier.check_invariants()
    tier.check_idle()
    assert wrong == []
    assert tier.stats().num_hits > 0
    for change in told:
        for block_hash in change.removed:
            assert seen.pop(block_hash), "removed before it was stored"
        seen.update(dict.fromkeys(change.stored, True))
    assert set(seen) == {key(n) for n in range(20) if key(n) in tier}


def test_a_touched_run_makes_room_last_and_from_its_end() -> None:
    tier = HostTier(4, BLOCK_BYTES)
    for n in (1, 2, 3, 4):
        assert tier.put(key(n), block(n))
    before = tier.stats()
    # A block that is not held is no matter, and looking is not asking.
    tier.touch(keys(1, 2, 9))
    assert (tier.stats().num_hits, tier.stats().num_misses) == (before.num_hits, before.num_misses)
    gone = []
    for n in (11, 12, 13):
        assert tier.put(key(n), block(n))
        gone.append([m for m in (1, 2, 3, 4) if key(m) not in tier])
    assert gone == [[3], [3, 4], [2, 3, 4]]
    tier.check_invariants()
