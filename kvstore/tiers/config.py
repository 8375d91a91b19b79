"""How much is kept in which tier, checked before any of it is taken."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdmesh.config import option
from pdmesh.errors import ConfigError
from pdmesh.host_memory import available_host_bytes

if TYPE_CHECKING:
    # Late, where they are needed: a supervisor of ranks reads this config, and keeps nothing.
    from kvstore.tiers.disk import DiskTier
    from kvstore.tiers.stack import TierStack
    from pdmesh.types import PairingFacts

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class TierConfig:
    """Raises ConfigError for sizes that make no sense, whatever the model and the machine."""

    kv_host_gib: float = option("GiB of host memory for KV blocks that left the cache; 0: none", default=0.0)
    kv_disk_gib: float = option("GiB of disk for KV blocks below host memory; 0: none", default=0.0)
    kv_disk_dir: str | None = option(
        "directory for KV blocks on disk; each worker needs its own, and models may take turns in one", default=None
    )

    def __post_init__(self) -> None:
        for name in ("kv_host_gib", "kv_disk_gib"):
            size = getattr(self, name)
            if not 0 <= size < float("inf"):
                raise ConfigError(f"{name} is {size}: must be 0 or more")
        if (self.kv_disk_dir is None) != (self.kv_disk_gib == 0):
            raise ConfigError("kv_disk_dir and kv_disk_gib belong together: give both or neither")
        if self.kv_disk_gib and self.kv_disk_gib < self.kv_host_gib:
            raise ConfigError(
                f"kv_disk_gib is {self.kv_disk_gib:g}, less than kv_host_gib, {self.kv_host_gib:g}: the disk keeps all "
                "that host memory holds and more; raise it"
            )
        if self.kv_disk_gib and not self.kv_host_gib:
            raise ConfigError("blocks reach the disk through host memory: give kv_host_gib as well, 1 for instance")

    def open(self, facts: "PairingFacts", block_bytes: int) -> "TierStack | None":
        """The tiers for blocks of `block_bytes` of this model; None where none are wanted.

        Raises ConfigError where memory or disk has no room for them, and as DiskTier does.
        """
        if not self.kv_host_gib:
            return None
        from kvstore.tiers.host import HostTier
        from kvstore.tiers.stack import TierStack

        num_host_blocks = int(self.kv_host_gib * _GIB) // block_bytes
        if num_host_blocks < 1:
            raise ConfigError(f"kv_host_gib has room for no block of {block_bytes} bytes: raise it")
        available_bytes = available_host_bytes()
        if num_host_blocks * block_bytes > available_bytes:
            raise ConfigError(
                f"kv_host_gib is {self.kv_host_gib:g} and {available_bytes / _GIB:.2f} GiB of memory are free: lower it"
            )
        disk = None if self.kv_disk_dir is None else self._open_disk(Path(self.kv_disk_dir), facts, block_bytes)
        return TierStack(HostTier(num_host_blocks, block_bytes), disk)

    def _open_disk(self, root: Path, facts: "PairingFacts", block_bytes: int) -> "DiskTier":
        from kvstore.tiers.disk import DiskTier
        from kvstore.tiers.disk_format import directory_name, slots_within

        num_bytes = int(self.kv_disk_gib * _GIB)
        num_blocks = slots_within(num_bytes, block_bytes)
        if num_blocks < 1:
            raise ConfigError(f"kv_disk_gib has room for no block of {block_bytes} bytes: raise it")
        try:
            root.mkdir(parents=True, exist_ok=True)
            free_bytes = _free_bytes(root) + _taken_bytes(root / directory_name(facts, block_bytes))
        except OSError as error:
            raise ConfigError(f"kv_disk_dir is {root}: {error.strerror or error}; name another directory") from error
        if num_bytes > free_bytes:
            raise ConfigError(
                f"kv_disk_gib is {self.kv_disk_gib:g} and {free_bytes / _GIB:.2f} GiB can be had in {root}: lower it, "
                "or delete the directories in it of models that are served no more"
            )
        return DiskTier(root, facts, block_bytes, num_blocks)


def _free_bytes(directory: Path) -> int:
    state = os.statvfs(directory)
    return state.f_bavail * state.f_frsize


def _taken_bytes(directory: Path) -> int:
    """What the tier takes already: its files are sparse, so their length says nothing."""
    if not directory.is_dir():
        return 0
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())
