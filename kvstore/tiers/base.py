"""Tiers of KV blocks: the words, and how what changes in one is told.

A block is found by its BlockHash in one tier or in several; what is nearer is faster and smaller:

    POOL   the engine's own memory (engine/block_pool.py)
    HOST   memory of this machine (host.py)
    DISK   a directory of this machine (disk.py)
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from pdmesh.hashing import BlockHash

log = logging.getLogger(__name__)


class Tier(Enum):
    """Nearest first."""

    POOL = "pool"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class TierChange:
    """Blocks that `tier` now holds or holds no more; `removed` applies before `stored`."""

    tier: Tier
    stored: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()


Listener = Callable[[TierChange], None]


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


@dataclass(slots=True)
class Counters:
    """What a tier counts; guarded by the tier's lock."""

    num_hits: int = 0
    num_misses: int = 0
    num_stored: int = 0
    num_evicted: int = 0
    num_dropped: int = 0
    num_corrupt: int = 0
    read_s: float = 0.0
    write_s: float = 0.0

    def stats(self, num_slots: int, num_blocks: int, block_bytes: int) -> TierStats:
        return TierStats(
            num_slots=num_slots,
            num_blocks=num_blocks,
            num_bytes=num_blocks * block_bytes,
            num_hits=self.num_hits,
            num_misses=self.num_misses,
            num_stored=self.num_stored,
            num_evicted=self.num_evicted,
            num_dropped=self.num_dropped,
            num_corrupt=self.num_corrupt,
            read_s=self.read_s,
            write_s=self.write_s,
        )


class ChangeFeed:
    """Tells listeners what changed, in the order in which it did, without a lock held.

    A tier calls `record` under its lock and `deliver` after; whichever thread delivers, delivers for all, so nobody
    waits for another's listener. A listener is called by one thread at a time, must be quick and may call the tier.
    """

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._listeners: tuple[Listener, ...] = ()
        self._queue: deque[tuple[TierChange, tuple[Listener, ...]]] = deque()
        self._delivering = threading.Lock()

    def add(self, listener: Listener, held: Sequence[BlockHash]) -> None:
        """Under the tier's lock: tells `listener` what is `held` now, and from now on every change."""
        self._queue.append((TierChange(self._tier, stored=tuple(held)), (listener,)))
        self._listeners = (*self._listeners, listener)

    def record(self, stored: Sequence[BlockHash] = (), removed: Sequence[BlockHash] = ()) -> None:
        """Under the tier's lock."""
        if self._listeners and (stored or removed):
            self._queue.append((TierChange(self._tier, tuple(stored), tuple(removed)), self._listeners))

    def deliver(self) -> None:
        """Without the tier's lock."""
        # Asked again after the release: what came while another thread held the lock is left to that thread.
        while self._queue and self._delivering.acquire(blocking=False):
            try:
                while self._queue:
                    change, listeners = self._queue.popleft()
                    for listener in listeners:
                        _tell(listener, change)
            finally:
                self._delivering.release()


def _tell(listener: Listener, change: TierChange) -> None:
    try:
        listener(change)
    except Exception:
        log.exception("a listener to the %s tier failed, a defect of ours; the others are told", change.tier.value)
