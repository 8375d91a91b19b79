"""Tiers of KV blocks below an engine's cache: the words."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier since it was opened.

    Attributes:
        num_slots: Blocks that it has room for.
        num_blocks: Blocks that it holds.
        num_bytes: What these take, without overhead.
        num_hits: Blocks that were asked for and given.
        num_misses: Blocks that were asked for and not held, corrupt ones included.
        num_stored: Blocks that came in.
        num_evicted: Blocks that left for others and lie on the tier below, or have none below.
        num_dropped: Blocks that were lost: evicted before the tier below had them, or not taken for want of room.
        num_corrupt: Blocks whose bytes failed their checksum.
        read_s: Seconds spent in reading, over all threads.
        write_s: Seconds spent in writing, over all threads.
    """

    num_slots: int
    num_blocks: int
    num_bytes: int
    num_hits: int
    num_misses: int
    num_stored: int
    num_evicted: int
    num_dropped: int
    num_corrupt: int
    read_s: float
    write_s: float
