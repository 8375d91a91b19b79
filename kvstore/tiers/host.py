"""KV blocks in host memory: a slab of slots, each found by the hash of the block in it.

A slot's life:

    free ──reserve──▶ reserved ──commit──▶ committed ◀──pin / unpin──▶ pinned
      ▲                   │                    │
      └──────release──────┴───────evicted──────┘

Whoever reserved a slot writes it; nobody else finds it before `commit`. A pinned slot keeps its bytes until it is
unpinned as often as it was pinned. Where a disk lies below, a committed slot is also written or unwritten: a writer
takes unwritten ones with `take_unwritten`, the least recently used first, and ends each with `finish_write`. Slots are
reused in the order of last use, written ones first, so memory is the queue to the disk and nobody who stores waits for
it: only where all that is not pinned is unwritten, the disk is behind by all of this memory, and the oldest block is
lost.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from kvstore.tiers.base import ChangeFeed, Counters, Listener, Tier, TierStats
from pdmesh.errors import InternalError
from pdmesh.hashing import BlockHash
from pdmesh.kv_memory import shared_memory


class HostTier:
    """`num_blocks` slots of `block_bytes` in memory that the system provides as it is first written.

    It has the shape of `kvstore.transfer.base.BlockMemory`, slots being block ids: transfers send from pinned slots and
    receive into reserved ones. Thread-safe; copies run outside the lock and without the GIL.
    """

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        assert num_blocks > 0, "a tier has room for a block at least"
        assert block_bytes > 0, "blocks have bytes"
        self.num_blocks = num_blocks
        self._block_bytes = block_bytes
        # Unmapped when the last view of it is gone.
        self._slab, self.file = shared_memory(num_blocks * block_bytes)
        self._lock = threading.Lock()
        self._unwritten_changed = threading.Condition(self._lock)
        self._write_back = False
        # Taken from the end: a slot that was used before has its memory.
        self._free = list(reversed(range(num_blocks)))
        self._reserved: set[int] = set()
        self._index: dict[BlockHash, int] = {}
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._pins = [0] * num_blocks
        # Committed and not pinned, the least recently used first; each slot in one of the two.
        self._written: OrderedDict[int, None] = OrderedDict()
        self._unwritten: OrderedDict[int, None] = OrderedDict()
        # Committed, pinned or not, and to be written.
        self._to_write: set[int] = set()
        self._changes = ChangeFeed(Tier.HOST)
        self._counters = Counters()

    @property
    def block_bytes(self) -> int:
        return self._block_bytes

    def place(self, slot: int) -> int:
        """Where in `file` a slot begins, in bytes."""
        return slot * self._block_bytes

    def view(self, slot: int) -> memoryview:
        """The writable bytes of one slot, `block_bytes` long; for whoever reserved or pinned it."""
        return self._slab[slot * self._block_bytes : (slot + 1) * self._block_bytes]

    def to_host(self, block_ids: Sequence[int]) -> None:
        """Nothing: the bytes are there."""

    def to_device(self, block_ids: Sequence[int]) -> None:
        """Nothing: there is no device."""

    def __contains__(self, block_hash: BlockHash) -> bool:
        """Whether the block is held at this moment; `pin` it to rely on that."""
        return block_hash in self._index

    def reserve(self, num_slots: int) -> list[int]:
        """Takes slots to write to, evicting what was used least recently; fewer where the rest is reserved or pinned.

        Each is to be given to `commit` or `release`.
        """
        slots: list[int] = []
        removed: list[BlockHash] = []
        with self._lock:
            while len(slots) < num_slots:
                if self._free:
                    slot = self._free.pop()
                elif self._written or self._unwritten:
                    slot = self._evict(removed)
                else:
                    break
                slots.append(slot)
            self._reserved.update(slots)
            self._changes.record(removed=removed)
        self._changes.deliver()
        return slots

    def _evict(self, removed: list[BlockHash]) -> int:
        if self._written:
            slot, _ = self._written.popitem(last=False)
            self._counters.num_evicted += 1
        else:
            slot, _ = self._unwritten.popitem(last=False)
            self._end_write(slot)
            self._counters.num_dropped += 1
        block_hash = self._hashes[slot]
        assert block_hash is not None, f"slot {slot} is committed under no hash"
        del self._index[block_hash]
        self._hashes[slot] = None
        removed.append(block_hash)
        return slot

    def release(self, slots: Iterable[int]) -> None:
        """Gives reserved slots back unused. Raises InternalError for a slot that is not reserved."""
        with self._lock:
            for slot in slots:
                self._end_reservation(slot)
                self._free.append(slot)

    def _end_reservation(self, slot: int) -> None:
        if slot not in self._reserved:
            raise InternalError(f"slot {slot} of host memory is not reserved")
        self._reserved.remove(slot)

    def commit(self, slot: int, block_hash: BlockHash, *, written: bool = False, pin: bool = False) -> int:
        """Ends a reservation: the slot holds this block, whole. Returns the slot in which the block is found.

        That is another one where the block was here already; the reserved one is free then.

        Args:
            written: The tier below has it.
            pin: Pins the returned slot.

        Raises InternalError for a slot that is not reserved.
        """
        with self._lock:
            self._end_reservation(slot)
            found = self._index.setdefault(block_hash, slot)
            if found == slot:
                self._hashes[slot] = block_hash
                if self._write_back and not written:
                    self._to_write.add(slot)
                self._counters.num_stored += 1
                self._changes.record(stored=(block_hash,))
            else:
                self._free.append(slot)
            self._leave_order(found)
            if pin:
                self._pins[found] += 1
            self._enter_order(found)
        self._changes.deliver()
        return found

    def pin(self, hashes: Iterable[BlockHash]) -> dict[BlockHash, int]:
        """Pins those of the blocks that are held, wherever they stand in `hashes`; their slots are to be unpinned."""
        found: dict[BlockHash, int] = {}
        with self._lock:
            for block_hash in hashes:
                slot = self._index.get(block_hash)
                if slot is None:
                    self._counters.num_misses += 1
                    continue
                self._counters.num_hits += 1
                if block_hash in found:
                    continue
                self._leave_order(slot)
                self._pins[slot] += 1
                found[block_hash] = slot
        return found

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """Counts those that are held as used now; as with `unpin`, a run's first block is the last to be evicted."""
        with self._lock:
            for block_hash in reversed(hashes):
                slot = self._index.get(block_hash)
                if slot is not None:
                    self._leave_order(slot)
                    self._enter_order(slot)

    def unpin(self, slots: Sequence[int]) -> None:
        """Takes one pin from each slot. Raises InternalError for one that has none.

        Pass a run's slots first to last: its last block is evicted before its first, without which it has no use.
        """
        with self._lock:
            for slot in reversed(slots):
                self._unpin(slot)

    def _unpin(self, slot: int) -> None:
        if self._pins[slot] == 0:
            raise InternalError(f"slot {slot} of host memory is not pinned")
        self._pins[slot] -= 1
        self._enter_order(slot)

    def put(self, block_hash: BlockHash, view: memoryview, *, written: bool = False) -> bool:
        """Copies a block in; False where every slot is reserved or pinned. Waits for nothing but the copy."""
        assert view.nbytes == self._block_bytes, "a view of another size"
        began = time.perf_counter()
        with self._lock:
            if (held := self._index.get(block_hash)) is not None:
                self._leave_order(held)
                self._enter_order(held)
                return True
        slots = self.reserve(1)
        if slots:
            np.copyto(_array(self.view(slots[0])), _array(view))
            self.commit(slots[0], block_hash, written=written)
        with self._lock:
            self._counters.num_dropped += not slots
            self._counters.write_s += time.perf_counter() - began
        return bool(slots)

    def read(self, slot: int, view: memoryview) -> None:
        """Copies a pinned slot out into `view`."""
        began = time.perf_counter()
        np.copyto(_array(view), _array(self.view(slot)))
        with self._lock:
            self._counters.read_s += time.perf_counter() - began

    def start_write_back(self) -> None:
        """Somebody takes unwritten blocks from now on; those that are here count as written."""
        with self._lock:
            self._write_back = True

    def take_unwritten(self) -> tuple[BlockHash, int] | None:
        """Pins the unwritten block that was used least recently, and that nobody has pinned, for `finish_write`.

        Waits until there is one; None once `stop_write_back` was called.
        """
        with self._lock:
            self._unwritten_changed.wait_for(lambda: self._unwritten or not self._write_back)
            if not self._unwritten:
                return None
            slot, _ = self._unwritten.popitem(last=False)
            self._pins[slot] += 1
            block_hash = self._hashes[slot]
            assert block_hash is not None, f"slot {slot} is committed under no hash"
            return block_hash, slot

    def finish_write(self, slot: int) -> None:
        """Unpins a slot from `take_unwritten`: the tier below has the block, or will not have it."""
        with self._lock:
            self._end_write(slot)
            self._unpin(slot)

    def _end_write(self, slot: int) -> None:
        self._to_write.discard(slot)
        self._unwritten_changed.notify_all()

    def wait_written(self, timeout_s: float) -> int:
        """Waits until every block is written; returns how many are not after `timeout_s`."""
        with self._lock:
            self._unwritten_changed.wait_for(lambda: not self._to_write, timeout_s)
            return len(self._to_write)

    def stop_write_back(self) -> None:
        """Nobody takes unwritten blocks any more: they count as written."""
        with self._lock:
            self._write_back = False
            self._to_write.clear()
            self._written.update(self._unwritten)
            self._unwritten.clear()
            self._unwritten_changed.notify_all()

    def subscribe(self, listener: Listener) -> None:
        """Tells `listener` what is held now, then every change, on whatever thread makes it; see ChangeFeed."""
        with self._lock:
            self._changes.add(listener, list(self._index))
        self._changes.deliver()

    def stats(self) -> TierStats:
        with self._lock:
            return self._counters.stats(self.num_blocks, len(self._index), self._block_bytes)

    def _leave_order(self, slot: int) -> None:
        self._written.pop(slot, None)
        self._unwritten.pop(slot, None)

    def _enter_order(self, slot: int) -> None:
        """Makes a slot the one used last, unless it is pinned."""
        if self._pins[slot]:
            return
        if slot in self._to_write:
            self._unwritten[slot] = None
            self._unwritten_changed.notify_all()
        else:
            self._written[slot] = None

    def check_invariants(self) -> None:
        """Raises AssertionError where the books do not add up; callable at any time. O(num_blocks)."""
        with self._lock:
            states = [set(self._free), self._reserved, set(self._written), set(self._unwritten)]
            states.append({slot for slot, num_pins in enumerate(self._pins) if num_pins})
            assert sum(map(len, states)) == self.num_blocks, "a slot is in two states or in none"
            assert set().union(*states) == set(range(self.num_blocks))
            assert len(self._free) == len(states[0]), "a slot is free twice"
            committed = {slot for slot, block_hash in enumerate(self._hashes) if block_hash is not None}
            assert committed == set(self._index.values()) == states[2] | states[3] | states[4]
            assert len(self._index) == len(committed)
            assert all(self._hashes[slot] == block_hash for block_hash, slot in self._index.items())
            assert not self._to_write & set(self._written)
            assert set(self._unwritten) <= self._to_write <= committed

    def check_idle(self) -> None:
        """Raises AssertionError where a slot is reserved or pinned, which somebody forgot to give back."""
        with self._lock:
            assert not self._reserved, f"reserved: {sorted(self._reserved)}"
            assert not any(self._pins), f"pinned: {[slot for slot, num in enumerate(self._pins) if num]}"


def _array(view: memoryview) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(view, np.uint8)
