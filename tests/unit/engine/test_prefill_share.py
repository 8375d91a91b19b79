"""What a step costs, learned from hand-fed durations, and what that leaves for prompts beside decodes."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prefill_share import StepCost, StepCostEstimate, max_prefill_tokens

# A step of the reference box: 5 ms for the weights, a quarter of a millisecond for each token.
FIXED_S, TOKEN_S = 0.005, 0.00025


def duration(num_tokens: int) -> float:
    return FIXED_S + TOKEN_S * num_tokens


def estimate_of(steps: list[tuple[int, float]]) -> StepCostEstimate:
    estimate = StepCostEstimate()
    for num_tokens, duration_s in steps:
        estimate.record(num_tokens, duration_s)
    return estimate


def test_nothing_is_known_from_steps_of_one_size() -> None:
    assert StepCostEstimate().cost is None
    assert estimate_of([(8, 0.007)] * 5).cost is None


def test_learns_the_line_from_two_sizes() -> None:
    cost = estimate_of([(512, duration(512)), (8, duration(8))]).cost
    assert cost is not None
    assert cost.fixed_s == pytest.approx(FIXED_S)
    assert cost.token_s == pytest.approx(TOKEN_S)


def test_learns_it_from_noisy_steps() -> None:
    noise = random.Random(0)
    sizes = [noise.choice([8, 8, 8, 32, 200]) for _ in range(300)]
    cost = estimate_of([(size, duration(size) * noise.uniform(0.9, 1.1)) for size in sizes]).cost
    assert cost is not None
    for size in (8, 32, 200):
        assert cost.of(size) == pytest.approx(duration(size), rel=0.1)


def test_forgets_how_fast_the_machine_once_was() -> None:
    fast, slow = [(8, duration(8)), (32, duration(32))] * 100, [(8, 3 * duration(8)), (32, 3 * duration(32))] * 100
    cost = estimate_of(fast + slow).cost
    assert cost is not None
    assert cost.of(8) == pytest.approx(3 * duration(8), rel=0.05)


def test_a_step_that_the_machine_was_away_in_counts_little() -> None:
    steps = [(8, duration(8)), (32, duration(32))] * 50
    cost = estimate_of([*steps, (8, 10.0)]).cost
    assert cost is not None
    assert cost.of(8) < 1.2 * duration(8)


def test_keeps_the_cost_of_a_token_while_all_steps_are_alike() -> None:
    cost = estimate_of([(512, duration(512)), (8, duration(8))] + [(8, duration(8))] * 2000).cost
    assert cost is not None
    assert cost.of(32) == pytest.approx(duration(32), rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0.0, 100.0)), min_size=1, max_size=50))
def test_both_parts_are_never_negative(steps: list[tuple[int, float]]) -> None:
    cost = estimate_of(steps).cost
    if cost is not None:
        assert cost.fixed_s >= 0
        assert cost.token_s >= 0
        max_prefill_tokens(cost, 3, 1000, max_slowdown=1.75, max_wait_s=2.0)


# What it leaves.

COST = StepCost(FIXED_S, TOKEN_S)


def limit(num_decodes: int, num_queued_tokens: int, cost: StepCost = COST) -> int:
    return max_prefill_tokens(cost, num_decodes, num_queued_tokens, max_slowdown=1.75, max_wait_s=2.0)


def test_a_mixed_step_takes_at_most_so_many_times_as_long() -> None:
    num_tokens = limit(8, 1024)
    # 8 decodes take 7 ms, and 0.75 of that pays for 21 tokens.
    assert num_tokens == 21
    assert COST.of(8 + num_tokens) <= 1.75 * COST.of(8)


def test_more_join_where_the_queue_would_take_too_long() -> None:
    # 4096 tokens take 1.024 s by themselves; 0.976 s are left for the decodes of their steps, 7 ms each: 139 steps.
    num_tokens = limit(8, 4096)
    assert num_tokens == 29
    assert 139 * num_tokens < 4096 < 140 * (num_tokens + 1)


def test_decodes_keep_a_quarter_of_the_time_however_long_the_queue() -> None:
    num_tokens = limit(8, 100_000)
    assert num_tokens == 84
    assert COST.of(8 + num_tokens) <= 4 * COST.of(8)


def test_prompts_never_stand_still() -> None:
    # A machine on which the weights cost nothing: one decode takes as long as one token.
    assert limit(1, 100, StepCost(0.0, 0.001)) == 16
