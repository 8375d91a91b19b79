"""Hand-offs over the real pool and leases, in any order, beside a model of what lies in each block.

tests/model explores every order within narrow bounds, over a pool of values; this takes random ones over the pool
that serves.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.api import BlockLease
from engine.block_pool import BlockPool
from engine.leases import LeaseTable, Reservation
from pdmesh.hashing import BlockHash

NUM_BLOCKS = 6
# Two prompts with nothing in common; each may be asked for in part.
HASHES = [[BlockHash(bytes([prompt, index]) * 8) for index in range(3)] for prompt in (1, 2)]
# In a block that is being written, or was only in part.
MIXED = BlockHash(bytes(16))


@dataclass(eq=False)
class Handoff:
    """One prompt's KV on its way into blocks.

    Attributes:
        lease: Empty when it was given back or passed on.
        block_ids: Of the whole prompt, where a writer was told to write; he does not forget them.
        hashes: Of the whole prompt.
        writing: Places that are being written, whether or not anybody wants that still.
        verified: Places that were, or held the right KV from the beginning.
        aborted: Nobody wants it any more.
    """

    lease: BlockLease
    block_ids: tuple[int, ...]
    hashes: list[BlockHash]
    writing: set[int] = field(default_factory=set)
    verified: set[int] = field(default_factory=set)
    aborted: bool = False


class HandoffsOverPool(RuleBasedStateMachine):
    """Hand-offs are reserved, written, verified, committed or aborted; requests hold what was committed."""

    # Blocks of an aborted hand-off rest until nobody writes to them.
    quarantine = True

    @initialize()
    def start(self) -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        self.leases = LeaseTable(self.pool, max_pinned_blocks=2)
        self.contents = [MIXED] * NUM_BLOCKS
        # Those that hold blocks.
        self.open: list[Handoff] = []
        self.writes: list[tuple[Handoff, int]] = []
        self.running: list[list[int]] = []

    @rule(prompt=st.integers(0, 1), num_blocks=st.integers(1, 3))
    def reserve(self, prompt: int, num_blocks: int) -> None:
        hashes = HASHES[prompt][:num_blocks]
        lease = BlockLease()
        # Something of a prompt is always left to compute.
        self.leases.pin_prefix(lease, hashes[:-1])
        num_missing = num_blocks - lease.num_cached_blocks
        if num_missing > self.pool.num_free_blocks:
            self.leases.release(lease)
            return
        self.leases.grant(Reservation(lease, num_missing))
        handoff = Handoff(lease, tuple(lease.block_ids), hashes, verified=set(range(lease.num_cached_blocks)))
        assert len(set(handoff.block_ids)) == num_blocks
        self.open.append(handoff)

    def writable(self) -> list[tuple[Handoff, int]]:
        """What a ticket allows to be written."""
        return [
            (handoff, place)
            for handoff in self.open
            for place in range(len(handoff.hashes))
            if not handoff.aborted and place not in handoff.verified | handoff.writing
        ]

    def complete(self) -> list[Handoff]:
        return [
            handoff for handoff in self.open if not handoff.aborted and len(handoff.verified) == len(handoff.hashes)
        ]

    @precondition(lambda self: self.writable())
    @rule(data=st.data())
    def begin_write(self, data: st.DataObject) -> None:
        handoff, place = data.draw(st.sampled_from(self.writable()))
        handoff.writing.add(place)
        self.writes.append((handoff, place))
        self.write(handoff, place, MIXED)

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), intact=st.sampled_from([True] * 7 + [False]))
    def end_write(self, data: st.DataObject, intact: bool) -> None:
        self.end(*data.draw(st.sampled_from(self.writes)), intact)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), really=st.sampled_from([False, False, True]))
    def abort(self, data: st.DataObject, really: bool) -> None:
        if not really:
            # Most get to their end, or hardly anything would be committed.
            return
        handoff = data.draw(st.sampled_from(self.open))
        handoff.aborted = True
        self.release_if_quiet(handoff)

    @precondition(lambda self: self.complete())
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        handoff = data.draw(st.sampled_from(self.complete()))
        self.open.remove(handoff)
        block_ids = self.leases.pass_on(handoff.lease)
        for block_id, block_hash in zip(block_ids, handoff.hashes, strict=True):
            assert self.contents[block_id] == block_hash, "what is committed is not what was verified"
            self.pool.commit(block_id, block_hash)
        self.running.append(block_ids)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        block_ids = data.draw(st.sampled_from(self.running))
        self.running.remove(block_ids)
        self.pool.free(block_ids)

    @rule(num_blocks=st.sampled_from([1, 1, 2, NUM_BLOCKS]))
    def evict(self, num_blocks: int) -> None:
        """Somebody else's request comes, computes something in its blocks, and goes."""
        if num_blocks <= self.pool.num_free_blocks:
            block_ids = self.pool.allocate(num_blocks)
            for block_id in block_ids:
                self.contents[block_id] = MIXED
            self.pool.free(block_ids)

    def end(self, handoff: Handoff, place: int, intact: bool) -> None:
        self.writes.remove((handoff, place))
        handoff.writing.remove(place)
        self.write(handoff, place, handoff.hashes[place] if intact else MIXED)
        if intact:
            handoff.verified.add(place)
        else:
            handoff.aborted = True
        self.release_if_quiet(handoff)

    def write(self, handoff: Handoff, place: int, content: BlockHash) -> None:
        """Like any writer, with no look at the pool."""
        block_id = handoff.block_ids[place]
        self.contents[block_id] = content
        assert handoff in self.open, "a write lands in a block that is not reserved for it any more"

    def release_if_quiet(self, handoff: Handoff) -> None:
        if handoff.aborted and handoff in self.open and not (self.quarantine and handoff.writing):
            self.open.remove(handoff)
            self.leases.release(handoff.lease)

    @invariant()
    def blocks_hold_what_they_are_found_by(self) -> None:
        self.pool.check_invariants()
        self.pool.check_holders([*self.leases.held_blocks(), *(block for held in self.running for block in held)])
        assert len(self.leases) == len(self.open)
        # By any hash, not only those that a run from the first one reaches.
        for block_hash in (block_hash for hashes in HASHES for block_hash in hashes):
            for block_id in self.pool.lookup([block_hash]):
                assert self.contents[block_id] == block_hash, "a committed block changed"

    def teardown(self) -> None:
        """Writers come to an end, nobody wants anything any more: nothing may be left."""
        for handoff, place in list(self.writes):
            self.end(handoff, place, intact=False)
        for handoff in list(self.open):
            handoff.aborted = True
            self.release_if_quiet(handoff)
        for block_ids in self.running:
            self.pool.free(block_ids)
        assert len(self.leases) == 0
        self.pool.check_holders([])
        assert self.pool.num_free_blocks == NUM_BLOCKS


TestHandoffsOverPool = HandoffsOverPool.TestCase
TestHandoffsOverPool.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


class WithoutQuarantine(HandoffsOverPool):
    """What is aborted is freed at once."""

    quarantine = False


def test_freeing_without_quarantine_is_found() -> None:
    # That it is found is enough; to look for the shortest way takes long.
    finding = settings(
        max_examples=1000, stateful_step_count=40, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate],
    )  # fmt: skip
    with pytest.raises(AssertionError, match="not reserved for it any more"):
        run_state_machine_as_test(WithoutQuarantine, settings=finding)
