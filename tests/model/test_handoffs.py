"""Hand-offs of KV, in every order in which anything can happen, within stated bounds.

In no order is there a use after free, wrong content under a hash, a transfer that ends twice, a leak, or somebody who
waits for ever. And the same exploration finds each of a number of seeded mistakes.
"""

from collections import Counter
from dataclasses import replace

import pytest

from tests.model.explore import Found, explore
from tests.model.handoffs import Handoffs
from tests.model.seeded import (
    BelievesFinish,
    CountsTwice,
    KeepsBlocks,
    KeepsFailureToItself,
    ReleasesWhileBusy,
    WritesAfterTheEnd,
)
from tests.model.world import Bounds, Rules, World

# One decode worker and one hand-off; it falls back from one transport to the next.
ALONE = Bounds(
    prompts=(1,), workers=(0,), num_blocks=2, prefill_blocks=2, decode_blocks=2, pulled=(True, False),
    num_attempts=1, num_faults=2,
)  # fmt: skip
# It asks again, with the next epoch, and keeps its blocks meanwhile.
RETRYING = Bounds(
    prompts=(1,), workers=(0,), num_blocks=1, prefill_blocks=1, decode_blocks=1, pulled=(False, True),
    num_attempts=2, num_faults=1,
)  # fmt: skip
# Two prompts go through the same block on both sides, one after the other.
ONE_BLOCK = Bounds(
    prompts=(1, 2), workers=(0, 0), num_blocks=1, prefill_blocks=1, decode_blocks=1, pulled=(True, False),
    num_attempts=1, num_faults=1,
)  # fmt: skip
# Two decode workers want the same, or not; the prefill worker has room for one of them.
SAME_PROMPT = Bounds(
    prompts=(1, 1), workers=(0, 1), num_blocks=1, prefill_blocks=1, decode_blocks=1, pulled=(True,),
    num_attempts=1, num_faults=1,
)  # fmt: skip
TWO_PROMPTS = Bounds(
    prompts=(1, 2), workers=(0, 1), num_blocks=1, prefill_blocks=1, decode_blocks=1, pulled=(True,),
    num_attempts=1, num_faults=1,
)  # fmt: skip
SMALL = (ALONE, RETRYING, ONE_BLOCK, SAME_PROMPT, TWO_PROMPTS)
LARGE = (
    replace(ONE_BLOCK, num_faults=2),
    replace(TWO_PROMPTS, pulled=(True, False)),
    replace(ALONE, num_faults=3),
)


def explore_all(bounds: Bounds, max_states: int) -> None:
    explored = explore(Handoffs(bounds), max_states)
    ends = Counter("+".join(sorted(asker.verdict for asker in world.askers)) for world in explored.quiet)
    print(f"{bounds}: {explored}: {dict(ends)}")
    # What was explored is what was meant: every kind of end is among them.
    verdicts = {asker.verdict for world in explored.quiet for asker in world.askers}
    assert verdicts == {"done", "failed", "cancelled", "crashed"}
    assert any(_all_done(world) and world.faults_left == bounds.num_faults for world in explored.quiet)
    assert any(_all_done(world) and not world.faults_left for world in explored.quiet)


def _all_done(world: World) -> bool:
    return all(asker.verdict == "done" for asker in world.askers)


@pytest.mark.parametrize(
    "bounds", [pytest.param(one, id=str(one), marks=pytest.mark.slow if one is SAME_PROMPT else ()) for one in SMALL]
)
def test_no_order_breaks_a_rule(bounds: Bounds) -> None:
    explore_all(bounds, max_states=150_000)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bounds", LARGE, ids=str)
def test_no_order_breaks_a_rule_within_wider_bounds(bounds: Bounds) -> None:
    explore_all(bounds, max_states=600_000)


PULLED = replace(ONE_BLOCK, pulled=(True,), decode_blocks=2, num_faults=1)

SEEDED = {
    "blocks are freed although a write is under way": (
        replace(ALONE, num_blocks=1), Rules(waits_for_quiet=False), "use after free: a write",
    ),
    "a ticket is taken for another": (
        replace(ALONE, num_blocks=1), Rules(checks_ticket=False), "use after free: a write",
    ),
    "a writer is let in after the end": (
        replace(ALONE, num_blocks=1), Rules(receiving=WritesAfterTheEnd), "after it was quiet",
    ),
    "finish is believed": (
        replace(ALONE, num_faults=1), Rules(receiving=BelievesFinish), "committed under 1. and holds 0",
    ),
    "a part that came twice counts twice": (
        replace(ALONE, num_faults=1), Rules(receiving=CountsTwice), "yet one is being written",
    ),
    "blocks are released while they are read": (
        replace(ALONE, num_faults=1), Rules(sending=ReleasesWhileBusy), "use after free: 0 reads",
    ),
    "blocks are not released": (
        replace(ALONE, num_faults=1), Rules(sending=KeepsBlocks), "waits for ever",
    ),
    "the receiver is not told of a failure": (
        replace(ALONE, num_faults=1), Rules(sending=KeepsFailureToItself), "waits for ever",
    ),
    "what was pulled is not verified": (PULLED, Rules(checks_checksum=False), "committed under .0 and holds"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEDED)
def test_a_seeded_mistake_is_found(name: str) -> None:
    bounds, rules, problem = SEEDED[name]
    with pytest.raises(Found, match=problem) as found:
        explore(Handoffs(bounds, rules), max_states=150_000)
    print(found.value)
    assert found.value.trace
