"""Tiers of KV blocks below an engine's cache: the words."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierStats:
    """What one tier holds now, and what it has done since the process started.

    Attributes:
        tier: Its name, e.g. "host" or "disk".
        num_blocks: Held now.
        num_bytes: Of these blocks.
        hits: Blocks asked for and found.
        misses: Blocks asked for and not found.
        stored: Blocks taken in.
        evicted: Blocks that made room for others.
        dropped: Blocks not taken in, since the tier was busy or full.
        corrupt: Blocks that failed their checksum when read, and were deleted.
        load_s: Seconds spent reading blocks, in all.
    """

    tier: str
    num_blocks: int
    num_bytes: int
    hits: int
    misses: int
    stored: int
    evicted: int
    dropped: int
    corrupt: int
    load_s: float
