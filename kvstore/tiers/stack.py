"""The tiers of one worker, or of a shared store, as one: blocks go down as memory fills, and come up when asked for.

    put(hash, view)        into host memory; the caller waits for one copy
    writer thread          host memory ──▶ disk, the least recently used first, as fast as the disk takes them
    load, fetch_into_host  from host memory, or from disk through host memory

Every block of host memory is written to disk once, soon after it came: room is then made without waiting, and a crash
loses little. Where the disk falls behind by all of host memory, blocks are lost, counted as dropped, and nobody waits.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvstore.tiers.base import Listener, Tier, TierStats
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from pdmesh.hashing import BlockHash
from pdmesh.types import Load

log = logging.getLogger(__name__)

# How long the end waits for reads and writes under way.
_END_S = 0.5


def with_tiers(load: Load, stats: Mapping[str, TierStats]) -> Load:
    """`load`, and how many blocks the tiers hold, by `TierStack.stats`."""
    held = {name: tier.num_blocks for name, tier in stats.items()}
    return replace(load, num_host_blocks=held[Tier.HOST.value], num_disk_blocks=held.get(Tier.DISK.value, 0))


class TierStack:
    """Host memory, and a disk below it where one is given; owns both. Thread-safe."""

    def __init__(self, host: HostTier, disk: DiskTier | None = None) -> None:
        assert disk is None or disk.block_bytes == host.block_bytes, "tiers of blocks of different sizes"
        self.host = host
        self.disk = disk
        self._writer: threading.Thread | None = None
        if disk is not None:
            host.start_write_back()
            # A daemon: a disk that hangs does not keep the process from ending.
            self._writer = threading.Thread(target=self._write_down, args=(disk,), name="tier-writer", daemon=True)
            self._writer.start()

    def put(self, block_hash: BlockHash, view: memoryview) -> bool:
        """Keeps a copy of a block; False where it could not. Waits for the copy, never for the disk."""
        on_disk = self.disk is not None and block_hash in self.disk
        self._touch_disk(block_hash)
        return self.host.put(block_hash, view, written=on_disk)

    def locate(self, hashes: Sequence[BlockHash]) -> list[Tier]:
        """For the longest run that begins `hashes`: the nearest tier that holds each. Holds nothing, waits for nothing.

        A block can be gone, or turn out corrupt, by the time it is loaded.
        """
        tiers: list[Tier] = []
        for block_hash in hashes:
            if block_hash in self.host:
                tiers.append(Tier.HOST)
            elif self.disk is not None and block_hash in self.disk:
                tiers.append(Tier.DISK)
            else:
                break
        return tiers

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """Counts the blocks as used now, in every tier that holds them: others make room before they do."""
        self.host.touch(hashes)
        for block_hash in reversed(hashes):
            self._touch_disk(block_hash)

    def load(self, hashes: Sequence[BlockHash], views: Sequence[memoryview]) -> int:
        """Fills the views with the blocks, first to last; returns how many are good. Blocks on I/O.

        Stops at the first block that is missing or corrupt, whose view may hold anything. What came from disk is in
        host memory after, as far as there was room.
        """
        assert len(hashes) == len(views), "one view for each block"
        # Held until the end: what comes up from disk must not push out what this call is about to read.
        pinned = self.host.pin(hashes)
        num_good = 0
        try:
            for block_hash, view in zip(hashes, views, strict=True):
                slot = pinned.get(block_hash)
                if slot is not None:
                    self.host.read(slot, view)
                    self._touch_disk(block_hash)
                elif not self._load_from_disk(block_hash, view):
                    break
                num_good += 1
        finally:
            self.host.unpin(list(pinned.values()))
        return num_good

    def _load_from_disk(self, block_hash: BlockHash, view: memoryview) -> bool:
        if self.disk is None or not self.disk.get(block_hash, view):
            return False
        self.host.put(block_hash, view, written=True)
        return True

    def fetch_into_host(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Slots of host memory with the longest run that can be had, pinned: give each to `host.unpin`. Blocks on I/O.

        Shorter than what `locate` says where a block is corrupt, or where all other slots are reserved or pinned.
        """
        assert len(set(hashes)) == len(hashes), "a block stands in a run once"
        pinned = self.host.pin(hashes)
        slots: list[int] = []
        try:
            for block_hash in hashes:
                if block_hash in pinned:
                    self._touch_disk(block_hash)
                    slots.append(pinned.pop(block_hash))
                elif (slot := self._fetch_one(block_hash, pinned)) is not None:
                    slots.append(slot)
                else:
                    break
        except BaseException:
            self.host.unpin(slots)
            raise
        finally:
            self.host.unpin(list(pinned.values()))
        return slots

    def _fetch_one(self, block_hash: BlockHash, pinned_ahead: dict[BlockHash, int]) -> int | None:
        """The pinned slot of a block from disk. Where there is no room, the end of the run that is held makes some."""
        if self.disk is None or block_hash not in self.disk:
            return None
        while not (reserved := self.host.reserve(1)):
            if not pinned_ahead:
                return None
            _, last = pinned_ahead.popitem()
            self.host.unpin([last])
        (slot,) = reserved
        if self.disk.get(block_hash, self.host.view(slot)):
            return self.host.commit(slot, block_hash, written=True, pin=True)
        self.host.release([slot])
        return None

    def _touch_disk(self, block_hash: BlockHash) -> None:
        """So that the disk keeps longest what is used, and not what it was last asked for itself."""
        if self.disk is not None:
            self.disk.touch(block_hash)

    def subscribe(self, listener: Listener) -> None:
        """Tells `listener` what each tier holds now, then every change, on any thread; it must be quick."""
        self.host.subscribe(listener)
        if self.disk is not None:
            self.disk.subscribe(listener)

    def stats(self) -> dict[str, TierStats]:
        """By the tier's name."""
        stats = {Tier.HOST.value: self.host.stats()}
        return stats if self.disk is None else {**stats, Tier.DISK.value: self.disk.stats()}

    def close(self, timeout_s: float = 10.0) -> None:
        """Writes what only host memory holds to disk, for `timeout_s` at most, and ends. Idempotent."""
        if self._writer is None or self.disk is None:
            return
        num_unwritten = self.host.wait_written(timeout_s)
        if num_unwritten:
            log.warning("%d KV blocks did not reach the disk within %g s: lost", num_unwritten, timeout_s)
        self.host.stop_write_back()
        self._writer.join(_END_S)
        self.disk.close(_END_S)

    def _write_down(self, disk: DiskTier) -> None:
        try:
            while disk.is_on and (taken := self.host.take_unwritten()) is not None:
                block_hash, slot = taken
                try:
                    disk.put(block_hash, self.host.view(slot))
                finally:
                    self.host.finish_write(slot)
        finally:
            # Whatever ended this: no block is kept for a writer that is not there.
            self.host.stop_write_back()
