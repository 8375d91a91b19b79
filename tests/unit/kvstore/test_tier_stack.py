"""Host memory and disk together: what goes down, what comes up, and that storing never waits for the disk."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from kvstore.tiers.base import Tier, TierChange
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.stack import TierStack
from pdmesh.hashing import BlockHash
from tests.tier_blocks import BLOCK_BYTES, FACTS, block, content, empty_views, key, keys

WRITTEN_S = 5.0


@contextmanager
def stack_of(root: Path | None, num_host: int = 3, num_disk: int = 8) -> Iterator[TierStack]:
    disk = None if root is None else DiskTier(root, FACTS, BLOCK_BYTES, num_disk)
    with closing(TierStack(HostTier(num_host, BLOCK_BYTES), disk)) as stack:
        yield stack
        check(stack)
    stack.host.check_idle()
    assert "tier-writer" not in [thread.name for thread in threading.enumerate()]


def check(stack: TierStack) -> None:
    stack.host.check_invariants()
    if stack.disk is not None:
        stack.disk.check_invariants()


def fill(stack: TierStack, *numbers: int) -> None:
    for n in numbers:
        assert stack.put(key(n), block(n))
        assert stack.host.wait_written(WRITTEN_S) == 0


def load(stack: TierStack, *numbers: int) -> int:
    views = empty_views(len(numbers))
    num_good = stack.load(keys(*numbers), views)
    for n, view in list(zip(numbers, views, strict=True))[:num_good]:
        assert view == block(n)
    check(stack)
    return num_good


class GatedWrites:
    """Stands in for os.pwritev: a disk that does not answer until it is `opened`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self._pwritev = os.pwritev
        patch.setattr(os, "pwritev", self)

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.reached.set()
        assert self.opened.wait(30.0)
        return self._pwritev(descriptor, buffers, offset)


def test_blocks_that_leave_memory_are_found_on_disk_and_come_back(tmp_path: Path) -> None:
    with stack_of(tmp_path) as stack:
        fill(stack, 1, 2, 3, 4, 5)
        assert stack.locate(keys(1, 2, 3, 4, 5, 6)) == [Tier.DISK, Tier.DISK, Tier.HOST, Tier.HOST, Tier.HOST]
        assert stack.locate(keys(6, 1)) == []
        assert load(stack, 1, 2, 3) == 3
        assert stack.locate(keys(1, 2, 3)) == [Tier.HOST] * 3, "what came from disk is in memory after"
        assert load(stack, 3, 6, 4) == 1
        stats = stack.stats()
        assert (stats["disk"].num_stored, stats["disk"].num_hits, stats["disk"].num_blocks) == (5, 2, 5)
        assert (stats["host"].num_dropped, stats["disk"].num_dropped) == (0, 0)


def test_without_a_disk_blocks_are_evicted_for_good() -> None:
    with stack_of(None) as stack:
        fill(stack, 1, 2, 3, 4)
        assert stack.locate(keys(2, 3, 4)) == [Tier.HOST] * 3
        assert stack.locate(keys(1)) == []
        assert load(stack, 2, 3, 1, 4) == 2
        assert "disk" not in stack.stats()
        assert stack.stats()["host"].num_evicted == 1


def test_a_run_longer_than_memory_is_loaded_whole(tmp_path: Path) -> None:
    with stack_of(tmp_path) as stack:
        fill(stack, *range(8))
        assert load(stack, *range(8)) == 8


def test_loading_does_not_push_out_what_it_is_about_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stack_of(tmp_path) as stack:
        fill(stack, 1, 2, 3)
        gate = GatedWrites(monkeypatch)
        for n in (4, 5):
            stack.put(key(n), block(n))
        assert gate.reached.wait(WRITTEN_S)
        # Blocks 4 and 5 are in memory alone, and what comes up for 1 and 2 needs room.
        assert load(stack, 1, 2, 4, 5) == 4
        gate.opened.set()


def test_storing_never_waits_for_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stack_of(tmp_path) as stack:
        gate = GatedWrites(monkeypatch)
        for n in range(20):
            assert stack.put(key(n), block(n))
        assert gate.reached.wait(WRITTEN_S)
        for n in range(20, 40):
            assert stack.put(key(n), block(n))
        assert stack.stats()["host"].num_dropped >= 20
        assert load(stack, 39) == 1
        gate.opened.set()
        assert stack.host.wait_written(WRITTEN_S) == 0
        assert stack.locate(keys(39)) == [Tier.HOST]


def test_what_is_on_disk_is_not_written_again(tmp_path: Path) -> None:
    with stack_of(tmp_path, num_host=1) as stack:
        fill(stack, 1, 2, 1, 2)
        assert load(stack, 1, 2) == 2
        assert stack.host.wait_written(WRITTEN_S) == 0
        assert "disk" in stack.stats()
        assert stack.disk is not None
        assert stack.disk.stats().num_stored == 2


def test_what_is_on_disk_makes_room_while_the_disk_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stack_of(tmp_path) as stack:
        fill(stack, 1, 2, 3, 4)
        gate = GatedWrites(monkeypatch)
        stack.put(key(5), block(5))
        assert gate.reached.wait(WRITTEN_S)
        stack.put(key(1), block(1))
        assert stack.host.wait_written(0.0) == 1, "block 5 alone is to be written"
        gate.opened.set()


@pytest.mark.parametrize("use", ["load", "put", "fetch"])
def test_what_is_used_in_memory_stays_on_disk(tmp_path: Path, use: str) -> None:
    with stack_of(tmp_path, num_host=2, num_disk=3) as stack:
        fill(stack, 1)
        for n in (2, 3, 4, 5):
            if use == "load":
                assert load(stack, 1) == 1
            elif use == "put":
                fill(stack, 1)
            else:
                stack.host.unpin(stack.fetch_into_host(keys(1)))
            fill(stack, n)
        assert stack.disk is not None
        assert key(1) in stack.disk


def test_closing_writes_what_memory_holds_and_a_restart_serves_it(tmp_path: Path) -> None:
    with stack_of(tmp_path) as stack:
        for n in (1, 2, 3):
            stack.put(key(n), block(n))
    stack.close()
    with stack_of(tmp_path) as stack:
        assert stack.locate(keys(1, 2, 3)) == [Tier.DISK] * 3
        assert load(stack, 1, 2, 3) == 3


def test_closing_takes_no_longer_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with stack_of(tmp_path) as stack:
        gate = GatedWrites(monkeypatch)
        stack.put(key(1), block(1))
        stack.put(key(2), block(2))
        closing_thread = threading.Thread(target=stack.close, args=(0.05,))
        closing_thread.start()
        closing_thread.join(WRITTEN_S)
        assert not closing_thread.is_alive()
        assert "2 KV blocks did not reach the disk" in caplog.text
        assert "does not answer" in caplog.text
        gate.opened.set()


def test_a_full_disk_leaves_memory_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with stack_of(tmp_path) as stack:
        monkeypatch.setattr(os, "pwritev", no_space)
        for n in range(6):
            assert stack.put(key(n), block(n))
            assert stack.host.wait_written(WRITTEN_S) == 0
        assert load(stack, 3, 4, 5) == 3
        assert stack.locate(keys(0)) == []
    assert len([record for record in caplog.records if "no longer kept on disk" in record.getMessage()]) == 1


def test_a_corrupt_block_ends_the_run_and_is_told_as_removed(tmp_path: Path) -> None:
    told: list[TierChange] = []
    with stack_of(tmp_path, num_host=1) as stack:
        fill(stack, 1, 2, 3, 4)
        assert stack.disk is not None
        blocks = stack.disk.directory / "blocks"
        data = bytearray(blocks.read_bytes())
        data[data.index(block(2))] ^= 1
        blocks.write_bytes(data)
        stack.subscribe(told.append)
        assert stack.locate(keys(1, 2, 3)) == [Tier.DISK] * 3
        assert load(stack, 1, 2, 3) == 1
        assert stack.fetch_into_host(keys(2)) == []
        assert TierChange(Tier.DISK, removed=(key(2),)) in told
        assert stack.locate(keys(1, 2, 3)) == [Tier.HOST]


def test_fetched_blocks_lie_pinned_in_memory(tmp_path: Path) -> None:
    with stack_of(tmp_path) as stack:
        fill(stack, 1, 2, 3, 4)
        slots = stack.fetch_into_host(keys(1, 2, 9, 3))
        assert [bytes(stack.host.view(slot)) for slot in slots] == [block(1), block(2)]
        fill(stack, 5, 6, 7)
        assert [bytes(stack.host.view(slot)) for slot in slots] == [block(1), block(2)]
        stack.host.unpin(slots)


def test_more_than_memory_holds_is_fetched_as_far_as_there_is_room(tmp_path: Path) -> None:
    with stack_of(tmp_path) as stack:
        fill(stack, *range(5))
        slots = stack.fetch_into_host(keys(*range(5)))
        assert [bytes(stack.host.view(slot)) for slot in slots] == [block(0), block(1), block(2)]
        stack.host.unpin(slots)


def test_changes_of_both_tiers_are_told(tmp_path: Path) -> None:
    told: list[TierChange] = []
    with stack_of(tmp_path, num_host=1) as stack:
        fill(stack, 1)
        stack.subscribe(told.append)
        fill(stack, 2)
    by_tier = {tier: [(c.stored, c.removed) for c in told if c.tier is tier] for tier in Tier}
    assert by_tier[Tier.HOST] == [((key(1),), ()), ((), (key(1),)), ((key(2),), ())]
    assert by_tier[Tier.DISK] == [((key(1),), ()), ((key(2),), ()), ((), (key(1), key(2)))]


def test_threads_that_put_load_and_fetch_at_once_never_see_wrong_bytes(tmp_path: Path) -> None:
    wrong: list[BlockHash] = []
    num_good = [0] * 4
    with stack_of(tmp_path, num_host=6, num_disk=12) as stack:

        def work(worker: int) -> None:
            views = empty_views(3)
            for step in range(100):
                n = (step * 7 + worker * 5) % 24
                stack.put(key(n), block(n))
                hashes = keys(n, (n + 1) % 24, (n + 2) % 24)
                good = stack.load(hashes, views)
                num_good[worker] += good
                seen = dict(zip(hashes[:good], views, strict=False))
                slots = stack.fetch_into_host(hashes)
                for block_hash, view in [*seen.items(), *zip(hashes, map(stack.host.view, slots), strict=False)]:
                    if view != content(block_hash):
                        wrong.append(block_hash)
                stack.host.unpin(slots)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert min(num_good) > 0
        stats = stack.stats()
        assert stats["disk"].num_hits > 0
        assert stats["disk"].num_corrupt == 0
