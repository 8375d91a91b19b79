"""Disk: what is served after restarts, and that no damaged block ever is."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.tiers.base import Tier, TierChange
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_format import HEADER_BYTES, slot_bytes, slots_within
from pdmesh.errors import ConfigError
from pdmesh.hashing import BlockHash
from pdmesh.types import PairingFacts
from tests.tier_blocks import BLOCK_BYTES, FACTS, block, content, empty_view, key

# Where a slot of the header file and one of the block file can be damaged: at either end, in the middle, between.
HEADER_OFFSETS = (0, 7, 8, 12, 16, 24, 39, 40, 59, 60, 63)
BLOCK_OFFSETS = (0, 1, 4095, 4096, BLOCK_BYTES // 2, BLOCK_BYTES - 1)


@contextmanager
def disk_tier(root: Path, num_blocks: int = 4) -> Iterator[DiskTier]:
    with closing(DiskTier(root, FACTS, BLOCK_BYTES, num_blocks)) as tier:
        yield tier
        tier.check_invariants()


def held(tier: DiskTier, *numbers: int) -> list[int]:
    """Those of the blocks that are given, after a look at their bytes."""
    found = []
    for n in numbers:
        view = empty_view()
        if tier.get(key(n), view):
            assert view == block(n)
            found.append(n)
        tier.check_invariants()
    return found


def test_a_block_that_was_put_is_read_back(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        assert tier.put(key(1), block(1))
        assert tier.put(key(1), block(1))
        assert held(tier, 1, 2) == [1]
        stats = tier.stats()
        assert (stats.num_slots, stats.num_blocks, stats.num_bytes) == (4, 1, BLOCK_BYTES)
        assert (stats.num_stored, stats.num_hits, stats.num_misses) == (1, 1, 1)
        assert stats.read_s > 0
        assert stats.write_s > 0


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        for n in (1, 2, 3, 4):
            tier.put(key(n), block(n))
        assert held(tier, 1) == [1]
        tier.touch(key(2))
        tier.touch(key(9))
        tier.put(key(5), block(5))
        assert held(tier, 1, 2, 3, 4, 5) == [1, 2, 4, 5]
        assert tier.stats().num_evicted == 1
        files = {path.name: path.stat().st_size for path in tier.directory.iterdir()}
        assert files["blocks"] == 4 * slot_bytes(BLOCK_BYTES)
        assert files["headers"] == 4 * HEADER_BYTES


def test_a_restart_keeps_blocks_and_their_order(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        for n in (3, 1, 4, 2, 5):
            tier.put(key(n), block(n))
    with disk_tier(tmp_path) as tier:
        assert tier.stats().num_blocks == 4
        tier.put(key(6), block(6))
        assert held(tier, 1, 2, 3, 4, 5, 6) == [2, 4, 5, 6]
    with disk_tier(tmp_path) as tier:
        tier.put(key(7), block(7))
        assert held(tier, 4, 2, 5, 6, 7) == [2, 5, 6, 7], "the order goes on where it was"


def test_a_smaller_and_a_larger_tier_take_over_what_fits(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        for n in (1, 2, 3, 4):
            tier.put(key(n), block(n))
    with disk_tier(tmp_path, num_blocks=2) as tier:
        assert held(tier, 1, 2, 3, 4) == [1, 2]
    with disk_tier(tmp_path, num_blocks=6) as tier:
        for n in (5, 6, 7, 8):
            tier.put(key(n), block(n))
        assert held(tier, 1, 2, 5, 6, 7, 8) == [1, 2, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "other", [replace(FACTS, model_digest="other"), replace(FACTS, kv_layout="block.layer.kv.head.token.dim")]
)
def test_models_layouts_and_sizes_share_a_root_and_no_blocks(tmp_path: Path, other: PairingFacts) -> None:
    with disk_tier(tmp_path) as tier, closing(DiskTier(tmp_path, other, BLOCK_BYTES, 4)) as other_tier:
        tier.put(key(1), block(1))
        assert key(1) not in other_tier
        with closing(DiskTier(tmp_path, FACTS, BLOCK_BYTES // 2, 4)) as small:
            assert key(1) not in small
    assert len(list(tmp_path.iterdir())) == 3


def test_a_directory_that_describes_something_else_is_refused(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        about = tier.directory / "about.json"
    about.write_text(about.read_text().replace("digest", "other"))
    with pytest.raises(ConfigError, match=f"delete {about.parent}"):
        DiskTier(tmp_path, FACTS, BLOCK_BYTES, 4)
    about.unlink()
    with disk_tier(tmp_path):
        assert about.exists()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="name another directory"):
        DiskTier(tmp_path / "file", FACTS, BLOCK_BYTES, 4)


def test_two_processes_cannot_share_a_directory(tmp_path: Path) -> None:
    again = (
        "from pathlib import Path; from kvstore.tiers.disk import DiskTier; from tests.tier_blocks import *\n"
        f"DiskTier(Path({str(tmp_path)!r}), FACTS, BLOCK_BYTES, 4)"
    )
    with disk_tier(tmp_path):
        refused = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, timeout=60)
        assert "ConfigError" in refused.stderr
        assert "in use by another process" in refused.stderr
    subprocess.run([sys.executable, "-c", again], check=True, timeout=60)


def damage(path: Path, offset: int, *, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


@pytest.mark.parametrize("mask", [0x01, 0x80])
@pytest.mark.parametrize("offset", HEADER_OFFSETS)
def test_a_flipped_bit_in_a_header_frees_the_slot(tmp_path: Path, offset: int, mask: int) -> None:
    with disk_tier(tmp_path, num_blocks=2) as tier:
        tier.put(key(1), block(1))
        tier.put(key(2), block(2))
    damage(tier.directory / "headers", offset, mask=mask)
    with disk_tier(tmp_path, num_blocks=2) as tier:
        assert held(tier, 1, 2) == [2]
        tier.put(key(3), block(3))
        assert held(tier, 2, 3) == [2, 3]


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("offset", BLOCK_OFFSETS)
def test_a_flipped_bit_in_a_block_is_found_and_the_block_dropped(
    tmp_path: Path, offset: int, reopened: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with disk_tier(tmp_path, num_blocks=2) as tier:
        tier.put(key(1), block(1))
        tier.put(key(2), block(2))
        if not reopened:
            damage(tier.directory / "blocks", offset, mask=0x10)
            check_first_is_dropped(tier)
    if reopened:
        damage(tier.directory / "blocks", offset, mask=0x10)
        with disk_tier(tmp_path, num_blocks=2) as tier:
            check_first_is_dropped(tier)
    assert "fails its checksum" in caplog.text


def check_first_is_dropped(tier: DiskTier) -> None:
    told: list[TierChange] = []
    tier.subscribe(told.append)
    assert held(tier, 1, 2) == [2]
    assert told[1:] == [TierChange(Tier.DISK, removed=(key(1),))]
    assert (tier.stats().num_corrupt, tier.stats().num_misses) == (1, 1)
    assert held(tier, 1) == []
    assert tier.stats().num_corrupt == 1
    assert tier.put(key(1), block(1)), "the slot is of use again"
    assert held(tier, 1, 2) == [1, 2]


def test_a_block_that_was_dropped_is_not_found_by_the_next_start(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        tier.put(key(1), block(1))
        damage(tier.directory / "blocks", 0, mask=0x10)
        assert held(tier, 1) == []
    with disk_tier(tmp_path) as tier:
        assert key(1) not in tier


@pytest.mark.parametrize("kept", [0, 1, 4096, BLOCK_BYTES - 1])
def test_a_block_file_that_was_cut_gives_no_half_blocks(tmp_path: Path, kept: int) -> None:
    with disk_tier(tmp_path, num_blocks=1) as tier:
        tier.put(key(1), block(1))
        os.truncate(tier.directory / "blocks", kept)
        assert held(tier, 1) == []
        assert tier.stats().num_corrupt == 1


class TornAt:
    """Stands in for os.pwritev: after `num_bytes` the process is as good as dead, with nothing written any more."""

    def __init__(self, num_bytes: int) -> None:
        self.num_left = num_bytes
        self._pwritev = os.pwritev

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        (data,) = buffers
        written = self._pwritev(descriptor, [data[: self.num_left]], offset) if self.num_left else 0
        self.num_left -= written
        if written < len(data):
            raise Torn
        return written


class Torn(BaseException):
    """A power cut."""


# A write is: a header of zeros, the block, the header.
TEARS = [
    *range(0, HEADER_BYTES, 21),
    *(HEADER_BYTES + offset for offset in BLOCK_OFFSETS),
    *(HEADER_BYTES + BLOCK_BYTES + offset for offset in HEADER_OFFSETS),
]


@pytest.mark.parametrize("num_bytes", TEARS)
def test_a_write_torn_anywhere_leaves_no_wrong_block(
    tmp_path: Path, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk_tier(tmp_path, num_blocks=2) as tier:
        tier.put(key(1), block(1))
        tier.put(key(2), block(2))
        torn = TornAt(num_bytes)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", torn)
            with pytest.raises(Torn):
                tier.put(key(3), block(3))
        assert torn.num_left == 0
        assert held(tier, 1, 2, 3) == [2]
    with disk_tier(tmp_path, num_blocks=2) as tier:
        # Before the first byte, the old block is as it was; from then on no header speaks for the slot.
        assert held(tier, 1, 2, 3) == ([1, 2] if num_bytes == 0 else [2])
        assert tier.stats().num_corrupt == 0
        tier.touch(key(2))
        tier.put(key(4), block(4))
        assert held(tier, 2, 4) == [2, 4]


def test_a_full_disk_switches_the_tier_off_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[TierChange] = []

    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with disk_tier(tmp_path) as tier:
        tier.put(key(1), block(1))
        tier.subscribe(told.append)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", no_space)
            assert not tier.put(key(2), block(2))
        assert not tier.is_on
        assert not tier.put(key(3), block(3))
        assert held(tier, 1, 2, 3) == []
        assert told[1:] == [TierChange(Tier.DISK, removed=(key(1),))]
        (record,) = caplog.records
        assert "No space left" in record.getMessage()
        assert "make room" in record.getMessage()
        assert tier.stats().num_dropped == 2
    with disk_tier(tmp_path) as tier:
        assert held(tier, 1, 2) == [1], "what was whole is there after the mending"


def test_a_read_error_switches_the_tier_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def io_error(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with disk_tier(tmp_path) as tier:
        tier.put(key(1), block(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", io_error)
            assert not tier.get(key(1), empty_view())
        assert not tier.is_on
        assert tier.stats().num_corrupt == 0


def test_a_block_that_is_being_read_does_not_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, reading, go_on = os.preadv, threading.Event(), threading.Event()

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reading.set()
        assert go_on.wait(10.0)
        return preadv(descriptor, buffers, offset)

    with disk_tier(tmp_path, num_blocks=1) as tier:
        tier.put(key(1), block(1))
        found: list[list[int]] = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", slow)
            reader = threading.Thread(target=lambda: found.append(held(tier, 1)))
            reader.start()
            assert reading.wait(10.0)
            assert not tier.put(key(2), block(2))
            tier.check_invariants()
            go_on.set()
            reader.join()
        assert found == [[1]]
        assert tier.put(key(2), block(2))


def test_reads_and_writes_that_do_little_at_a_time_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev, preadv = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, [buffers[0][:1000]], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:999]], offset))
    with disk_tier(tmp_path) as tier:
        assert tier.put(key(1), block(1))
        assert held(tier, 1) == [1]


def test_a_closed_tier_holds_nothing_and_takes_nothing(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        tier.put(key(1), block(1))
    tier.close()
    assert held(tier, 1) == []
    assert not tier.put(key(2), block(2))


def test_threads_that_put_and_read_at_once_never_see_wrong_bytes(tmp_path: Path) -> None:
    wrong: list[BlockHash] = []
    with disk_tier(tmp_path, num_blocks=6) as tier:

        def work(worker: int) -> None:
            view = empty_view()
            for step in range(150):
                block_hash = key((step * 7 + worker * 3) % 12)
                tier.put(block_hash, memoryview(content(block_hash)))
                if tier.get(block_hash, view) and view != content(block_hash):
                    wrong.append(block_hash)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        stats = tier.stats()
        assert stats.num_corrupt == 0
        assert stats.num_hits > 0
        assert stats.num_blocks == 6
    assert not tier.directory.joinpath("about.new").exists()


def test_sizes_count_what_is_taken_on_disk() -> None:
    per_block = slot_bytes(BLOCK_BYTES) + HEADER_BYTES
    assert slot_bytes(BLOCK_BYTES) == 8192
    assert slots_within(3 * per_block, BLOCK_BYTES) == 3
    assert slots_within(3 * per_block - 1, BLOCK_BYTES) == 2
