"""Sizes of the tiers: what makes no sense or does not fit is refused before anything is taken."""

from contextlib import closing
from pathlib import Path

import pytest

from kvstore.tiers.config import TierConfig
from kvstore.tiers.disk_format import slots_within
from pdmesh.config import parse
from pdmesh.errors import ConfigError
from tests.tier_blocks import BLOCK_BYTES, FACTS, block, empty_view, key

MIB_IN_GIB = 1 / 1024
EXBIBYTE_IN_GIB = float(1 << 30)


def test_flags_become_sizes(tmp_path: Path) -> None:
    flags = ["--kv-host-gib", "0.5", "--kv-disk-gib", "2", "--kv-disk-dir", str(tmp_path)]
    config = parse(TierConfig, flags, prog="worker", description="")
    assert config == TierConfig(kv_host_gib=0.5, kv_disk_gib=2.0, kv_disk_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kv_host_gib": -1.0}, "kv_host_gib is -1.0: must be 0 or more"),
        ({"kv_host_gib": float("nan")}, "must be 0 or more"),
        ({"kv_host_gib": float("inf")}, "must be 0 or more"),
        ({"kv_host_gib": 1.0, "kv_disk_gib": 2.0}, "give both or neither"),
        ({"kv_host_gib": 1.0, "kv_disk_dir": "/kv"}, "give both or neither"),
        ({"kv_host_gib": 2.0, "kv_disk_gib": 1.0, "kv_disk_dir": "/kv"}, "raise it"),
        ({"kv_disk_gib": 1.0, "kv_disk_dir": "/kv"}, "give kv_host_gib as well"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(config: dict[str, float | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TierConfig(**config)  # type: ignore[arg-type]


def test_nothing_is_kept_unless_asked_for() -> None:
    assert TierConfig().open(FACTS, BLOCK_BYTES) is None


def test_host_memory_alone() -> None:
    stack = TierConfig(kv_host_gib=MIB_IN_GIB).open(FACTS, BLOCK_BYTES)
    assert stack is not None
    assert stack.disk is None
    assert stack.stats()["host"].num_slots == (1 << 20) // BLOCK_BYTES


def test_both_tiers_and_again_over_what_they_left(tmp_path: Path) -> None:
    config = TierConfig(kv_host_gib=MIB_IN_GIB, kv_disk_gib=2 * MIB_IN_GIB, kv_disk_dir=str(tmp_path / "new" / "kv"))
    for expected in (0, 1):
        stack = config.open(FACTS, BLOCK_BYTES)
        assert stack is not None
        with closing(stack):
            stats = stack.stats()["disk"]
            assert stats is not None
            assert stats.num_slots == slots_within(2 << 20, BLOCK_BYTES)
            assert stack.load([key(1)], [empty_view()]) == expected
            stack.put(key(1), block(1))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"of memory are free: lower it"):
        TierConfig(kv_host_gib=EXBIBYTE_IN_GIB).open(FACTS, BLOCK_BYTES)
    with pytest.raises(ConfigError, match=r"kv_host_gib has room for no block"):
        TierConfig(kv_host_gib=1e-9).open(FACTS, BLOCK_BYTES)
    disk = TierConfig(kv_host_gib=MIB_IN_GIB, kv_disk_gib=EXBIBYTE_IN_GIB, kv_disk_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"can be had in .*: lower it, or delete"):
        disk.open(FACTS, BLOCK_BYTES)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"kv_disk_gib has room for no block"):
        TierConfig(kv_host_gib=1e-4, kv_disk_gib=1e-4, kv_disk_dir=str(tmp_path)).open(FACTS, 107_000)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = TierConfig(kv_host_gib=MIB_IN_GIB, kv_disk_gib=MIB_IN_GIB, kv_disk_dir=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="name another directory"):
        config.open(FACTS, BLOCK_BYTES)
