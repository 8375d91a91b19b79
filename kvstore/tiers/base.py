"""The tiers in which a KV block may lie."""

from enum import Enum


class Tier(Enum):
    """Where a block lies, nearest first: the engine's block pool, host memory, disk."""

    POOL = "pool"
    HOST = "host"
    DISK = "disk"
