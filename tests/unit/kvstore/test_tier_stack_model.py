"""The stack against a dict: whatever is stored, loaded, pinned, killed or restarted, right bytes or none."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.tiers.base import Tier, TierChange
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_format import slot_bytes
from kvstore.tiers.host import HostTier
from kvstore.tiers.stack import TierStack
from pdmesh.hashing import BlockHash
from tests.tier_blocks import FACTS, content, empty_view, key

BLOCK_BYTES = 48
NUM_HOST = 4
NUM_DISK = 6
WRITTEN_S = 5.0

BLOCKS = st.integers(0, 11).map(key)
RUNS = st.lists(BLOCKS, min_size=1, max_size=8, unique=True)


class StackAgainstDict(RuleBasedStateMachine):
    """`stored` is every block ever stored, `rotten` those that the disk once lost, `pinned` are slots held here, and
    `told` is what a listener believes.
    """

    @initialize(with_disk=st.booleans())
    def begin(self, with_disk: bool) -> None:
        self.root = Path(tempfile.mkdtemp()) if with_disk else None
        self.stored: dict[BlockHash, bytes] = {}
        self.rotten: set[BlockHash] = set()
        self.open()

    def open(self) -> None:
        disk = None if self.root is None else DiskTier(self.root, FACTS, BLOCK_BYTES, NUM_DISK)
        self.stack = TierStack(HostTier(NUM_HOST, BLOCK_BYTES), disk)
        self.pinned: list[tuple[BlockHash, int]] = []
        self.reserved: list[int] = []
        self.told: dict[Tier, set[BlockHash]] = {Tier.HOST: set(), Tier.DISK: set()}
        self.stack.subscribe(self.listen)

    def listen(self, change: TierChange) -> None:
        self.told[change.tier].difference_update(change.removed)
        self.told[change.tier].update(change.stored)

    def settle(self) -> None:
        """Until the writer has nothing to do; it cannot take what is pinned here."""
        if self.pinned:
            self.stack.host.wait_written(0.002)
        else:
            assert self.stack.host.wait_written(WRITTEN_S) == 0

    @rule(block_hash=BLOCKS)
    def put(self, block_hash: BlockHash) -> None:
        num_held = len({slot for _, slot in self.pinned}) + len(self.reserved)
        kept = self.stack.put(block_hash, memoryview(content(block_hash, BLOCK_BYTES)))
        # The writer holds one block at most.
        assert kept or num_held >= NUM_HOST - 1
        if kept:
            self.stored[block_hash] = content(block_hash, BLOCK_BYTES)
        self.settle()

    @rule(hashes=RUNS)
    def load(self, hashes: list[BlockHash]) -> None:
        located = self.stack.locate(hashes)
        views = [empty_view(BLOCK_BYTES) for _ in hashes]
        num_good = self.stack.load(hashes, views)
        # Of a writer at work, the disk may have lost a block meanwhile.
        assert num_good == len(located) or (self.pinned and num_good < len(located))
        for block_hash, view in list(zip(hashes, views, strict=True))[:num_good]:
            assert view == self.stored[block_hash]

    @rule(hashes=RUNS)
    def fetch(self, hashes: list[BlockHash]) -> None:
        located = self.stack.locate(hashes)
        slots = self.stack.fetch_into_host(hashes)
        assert len(slots) <= len(located)
        was_settled = not self.pinned
        self.pinned += zip(hashes, slots, strict=False)
        room = NUM_HOST - len({slot for _, slot in self.pinned}) - len(self.reserved)
        assert len(slots) == len(located) or room == 0 or not was_settled

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.pinned))
        self.pinned.remove(held)
        self.stack.host.unpin([held[1]])

    @rule(num_slots=st.integers(0, NUM_HOST))
    def reserve(self, num_slots: int) -> None:
        self.reserved += self.stack.host.reserve(num_slots)

    @precondition(lambda self: self.reserved)
    @rule(block_hash=BLOCKS, pin=st.booleans())
    def receive(self, block_hash: BlockHash, pin: bool) -> None:
        slot = self.reserved.pop()
        self.stack.host.view(slot)[:] = content(block_hash, BLOCK_BYTES)
        self.stored[block_hash] = content(block_hash, BLOCK_BYTES)
        found = self.stack.host.commit(slot, block_hash, pin=pin)
        if pin:
            self.pinned.append((block_hash, found))

    @precondition(lambda self: self.reserved)
    @rule()
    def release(self) -> None:
        self.stack.host.release(self.reserved)
        self.reserved = []

    @precondition(lambda self: self.root is not None)
    @rule(slot=st.integers(0, NUM_DISK - 1), offset=st.integers(0, BLOCK_BYTES - 1))
    def rot(self, slot: int, offset: int) -> None:
        """A bit flips on disk; what lies there is read to know what is left to be located."""
        disk = self.stack.disk
        assert disk is not None
        self.settle()
        with (disk.directory / "blocks").open("r+b") as file:
            place = slot * slot_bytes(BLOCK_BYTES) + offset
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 4]))
        for block_hash in list(self.told[Tier.DISK]):
            view = empty_view(BLOCK_BYTES)
            if disk.get(block_hash, view):
                assert view == self.stored[block_hash]
            else:
                self.rotten.add(block_hash)

    @rule()
    def restart(self) -> None:
        self.give_back()
        held = self.told[Tier.HOST] | self.told[Tier.DISK]
        self.stack.close()
        self.stack.host.check_idle()
        # Memory's copy of a block that rotted was on disk before, and is not written again.
        num_kept = min(len(held - self.rotten), NUM_DISK)
        self.open()
        if self.stack.disk is not None:
            assert len(self.told[Tier.DISK]) >= num_kept
            assert self.told[Tier.DISK] <= held

    def give_back(self) -> None:
        self.stack.host.release(self.reserved)
        self.stack.host.unpin([slot for _, slot in self.pinned])
        self.reserved, self.pinned = [], []

    @invariant()
    def nothing_is_wrong(self) -> None:
        for block_hash, slot in self.pinned:
            assert self.stack.host.view(slot) == self.stored[block_hash]
            assert block_hash in self.stack.host
        self.settle()
        self.stack.host.check_invariants()
        assert self.told[Tier.HOST] == {key(n) for n in range(12) if key(n) in self.stack.host}
        stats = self.stack.stats()
        assert stats["host"].num_blocks <= NUM_HOST
        if self.stack.disk is not None:
            self.stack.disk.check_invariants()
            assert stats["disk"].num_blocks <= NUM_DISK

    def teardown(self) -> None:
        self.give_back()
        self.stack.close()
        self.stack.host.check_idle()
        if self.root is not None:
            shutil.rmtree(self.root)


TestStackAgainstDict = StackAgainstDict.TestCase
TestStackAgainstDict.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
