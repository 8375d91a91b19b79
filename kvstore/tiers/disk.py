"""KV blocks on disk: bounded, checksummed, bound to one model, and there again after a restart.

Writing a block makes the slot's old header invalid, writes the bytes, then the new header. A process killed at any
point leaves a slot that is free or whole. A machine that loses power may leave any mixture, since nothing is synced:
every read checks the bytes against the header's CRC32C, and a block that fails is dropped, never returned.
After a restart blocks count as used in the order in which they were written; use is not recorded on disk.
"""

import fcntl
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from pathlib import Path

from kvstore.tiers.base import ChangeFeed, Counters, Listener, Tier, TierStats
from kvstore.tiers.disk_format import (
    HEADER_BYTES,
    SlotHeader,
    about,
    directory_name,
    read_headers,
    slot_bytes,
)
from kvstore.transfer.base import crc32c
from pdmesh.errors import ConfigError
from pdmesh.hashing import BlockHash
from pdmesh.types import PairingFacts

log = logging.getLogger(__name__)


class DiskTier:
    """At most `num_blocks` blocks in a directory of their own below `root`; the least recently used make room.

    Several models share a root, each in a directory named by its facts; two processes cannot share a directory.
    Thread-safe: one lock for the books, files are read and written outside it, straight from and into the views.
    After an I/O error, a full disk among them, the tier is off: it holds nothing, takes nothing, and says so once.

    Raises ConfigError where the directory cannot be made or opened, is in use, or describes something else.
    """

    def __init__(self, root: Path, facts: PairingFacts, block_bytes: int, num_blocks: int) -> None:
        assert num_blocks > 0, "a tier has room for a block at least"
        self.directory = root / directory_name(facts, block_bytes)
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self._slot_bytes = slot_bytes(block_bytes)
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._is_open = True
        self._free: list[int] = []
        # The least recently used first.
        self._index: OrderedDict[BlockHash, tuple[int, int]] = OrderedDict()
        self._writing: set[BlockHash] = set()
        self._num_readers: Counter[int] = Counter()
        # Forgotten while somebody else reads them; free after that.
        self._forgotten: set[int] = set()
        self._sequence = 0
        self._changes = ChangeFeed(Tier.DISK)
        self._counters = Counters()
        self._descriptors: list[int] = []
        try:
            self._open(about(facts, block_bytes))
        except OSError as error:
            self._close_files()
            raise ConfigError(
                f"KV blocks cannot be kept in {self.directory}: {error.strerror or error}; make it writable, or name "
                "another directory"
            ) from error
        except ConfigError:
            self._close_files()
            raise

    def _open(self, description: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = self._open_file("lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.directory} is in use by another process: give each worker a directory of its own"
            ) from error
        self._check_description(self.directory / "about.json", description)
        self._headers = self._open_file("headers")
        self._blocks = self._open_file("blocks")
        # A tier that was larger loses what lay beyond; one that was smaller gets a tail of zeros, which is free.
        os.ftruncate(self._headers, self.num_blocks * HEADER_BYTES)
        os.ftruncate(self._blocks, self.num_blocks * self._slot_bytes)
        self._load_index((self.directory / "headers").read_bytes())

    def _open_file(self, name: str) -> int:
        descriptor = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._descriptors.append(descriptor)
        return descriptor

    def _check_description(self, path: Path, expected: str) -> None:
        if not path.exists():
            # Whole or not there: a start that was killed here leaves a directory that the next one can use.
            path.with_suffix(".new").write_text(expected)
            path.with_suffix(".new").replace(path)
        elif path.read_text() != expected:
            raise ConfigError(
                f"{path} describes KV blocks of another model or size than this directory is named for: "
                f"delete {self.directory}, or name another directory"
            )

    def _load_index(self, headers: bytes) -> None:
        for slot, header in sorted(read_headers(headers), key=lambda item: item[1].sequence):
            self._sequence = header.sequence
            # Of two slots with one block, which only a power cut leaves, the later one counts.
            self._index[header.block_hash] = (slot, header.crc)
        used = {slot for slot, _ in self._index.values()}
        self._free = [slot for slot in reversed(range(self.num_blocks)) if slot not in used]

    @property
    def is_on(self) -> bool:
        """False after an I/O error, and once closed."""
        return self._is_open

    def __contains__(self, block_hash: BlockHash) -> bool:
        """Whether the block is held at this moment; only reading it tells whether it is whole."""
        return block_hash in self._index

    def touch(self, block_hash: BlockHash) -> None:
        """Counts a block as used now, because a nearer tier gave it; nothing where it is not held."""
        with self._lock:
            if block_hash in self._index:
                self._index.move_to_end(block_hash)

    def put(self, block_hash: BlockHash, view: memoryview) -> bool:
        """Writes a block; True once it is whole, also where it was held before. Blocks on I/O.

        False where the tier is off, every slot is being read or written, or another thread is writing this block.
        """
        assert view.nbytes == self.block_bytes, "a view of another size"
        began = time.perf_counter()
        with self._lock:
            if block_hash in self._index:
                self._index.move_to_end(block_hash)
                return True
            slot = self._take_slot() if self._is_open and block_hash not in self._writing else None
            if slot is None:
                self._counters.num_dropped += 1
                return False
            self._writing.add(block_hash)
            self._sequence = sequence = self._sequence + 1
        self._changes.deliver()
        stored = False
        try:
            crc = crc32c([view])
            self._write_slot(slot, SlotHeader(block_hash, crc, sequence), view)
            stored = True
        except OSError as error:
            self._switch_off(error)
        finally:
            with self._lock:
                self._writing.remove(block_hash)
                self._quiet.notify_all()
                stored = stored and self._is_open
                if stored:
                    self._index[block_hash] = (slot, crc)
                    self._changes.record(stored=(block_hash,))
                else:
                    self._free.append(slot)
                self._counters.num_stored += stored
                self._counters.num_dropped += not stored
                self._counters.write_s += time.perf_counter() - began
        self._changes.deliver()
        return stored

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        for block_hash, (slot, _) in self._index.items():
            # Readers are few: the first or one of the next is free of them.
            if not self._num_readers[slot]:
                del self._index[block_hash]
                self._counters.num_evicted += 1
                self._changes.record(removed=(block_hash,))
                return slot
        return None

    def _write_slot(self, slot: int, header: SlotHeader, view: memoryview) -> None:
        _write_all(self._headers, bytes(HEADER_BYTES), slot * HEADER_BYTES)
        _write_all(self._blocks, view, slot * self._slot_bytes)
        _write_all(self._headers, header.to_bytes(), slot * HEADER_BYTES)

    def get(self, block_hash: BlockHash, view: memoryview) -> bool:
        """Reads a block into `view`; False where it is not held or not whole, and then `view` may hold anything.

        Blocks on I/O.
        """
        assert view.nbytes == self.block_bytes, "a view of another size"
        began = time.perf_counter()
        with self._lock:
            entry = self._index.get(block_hash)
            if entry is None:
                self._counters.num_misses += 1
                return False
            slot, crc = entry
            self._index.move_to_end(block_hash)
            # Keeps the slot from being written.
            self._num_readers[slot] += 1
        intact = False
        try:
            num_bytes = _read_all(self._blocks, view, slot * self._slot_bytes)
            intact = num_bytes == self.block_bytes and crc32c([view]) == crc
            if not intact:
                # The next start is not to find it either.
                _write_all(self._headers, bytes(HEADER_BYTES), slot * HEADER_BYTES)
        except OSError as error:
            self._switch_off(error)
        finally:
            with self._lock:
                self._num_readers[slot] -= 1
                if not intact and self._index.get(block_hash) == entry:
                    self._forget_corrupt(block_hash, slot)
                self._end_read(slot)
                self._counters.num_hits += intact
                self._counters.num_misses += not intact
                self._counters.read_s += time.perf_counter() - began
        self._changes.deliver()
        return intact

    def _forget_corrupt(self, block_hash: BlockHash, slot: int) -> None:
        del self._index[block_hash]
        self._forgotten.add(slot)
        self._counters.num_corrupt += 1
        self._changes.record(removed=(block_hash,))
        log.warning("a KV block in slot %d of %s fails its checksum: dropped", slot, self.directory)

    def _end_read(self, slot: int) -> None:
        if self._num_readers[slot]:
            return
        del self._num_readers[slot]
        if slot in self._forgotten:
            self._forgotten.remove(slot)
            self._free.append(slot)
        self._quiet.notify_all()

    def _switch_off(self, error: OSError) -> None:
        with self._lock:
            if not self._is_open:
                return
            self._stop()
        self._changes.deliver()
        log.error(
            "KV blocks are no longer kept on disk, serving goes on without: %s: %s; make room there or replace the "
            "disk, then restart this process",
            self.directory,
            error.strerror or error,
        )

    def _stop(self) -> None:
        self._is_open = False
        self._changes.record(removed=list(self._index))
        self._free.extend(slot for slot, _ in self._index.values() if not self._num_readers[slot])
        self._forgotten.update(slot for slot, _ in self._index.values() if self._num_readers[slot])
        self._index.clear()

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the tier; what it holds is there for the next start. Idempotent.

        Waits `timeout_s` at most for reads and writes under way. Where a disk hangs for longer, the files stay open,
        and locked, until the process ends.
        """
        with self._lock:
            if self._is_open:
                self._stop()
            is_quiet = self._quiet.wait_for(lambda: not self._num_readers and not self._writing, timeout_s)
            if is_quiet:
                self._close_files()
        self._changes.deliver()
        if not is_quiet:
            log.error("the disk of %s does not answer: left open", self.directory)

    def _close_files(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def subscribe(self, listener: Listener) -> None:
        """Tells `listener` what is held now, then every change, on whatever thread makes it; see ChangeFeed."""
        with self._lock:
            self._changes.add(listener, list(self._index))
        self._changes.deliver()

    def stats(self) -> TierStats:
        with self._lock:
            return self._counters.stats(self.num_blocks, len(self._index), self.block_bytes)

    def check_invariants(self) -> None:
        """Raises AssertionError where the books do not add up; callable at any time. O(num_blocks)."""
        with self._lock:
            held = {slot for slot, _ in self._index.values()}
            free = set(self._free)
            assert len(held) == len(self._index), "two blocks in one slot"
            assert len(free) == len(self._free), "a slot is free twice"
            assert not free & held
            assert not self._forgotten & (free | held)
            assert all(self._num_readers[slot] > 0 for slot in self._num_readers.keys() | self._forgotten)
            assert len(free | held | self._forgotten) + len(self._writing) == self.num_blocks, "a slot was lost"


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwritev(descriptor, [rest], offset)
        rest, offset = rest[written:], offset + written


def _read_all(descriptor: int, view: memoryview, offset: int) -> int:
    """Fills `view`; returns how many bytes there were."""
    rest = view
    while rest:
        num_read = os.preadv(descriptor, [rest], offset)
        if not num_read:
            break
        rest, offset = rest[num_read:], offset + num_read
    return view.nbytes - rest.nbytes
