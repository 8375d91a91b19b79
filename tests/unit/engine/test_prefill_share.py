"""What a step costs, learned from hand-fed durations, and what that leaves for prompts beside decodes."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prefill_share import PrefillShare, StepCostEstimate

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
def test_whatever_steps_took_costs_are_positive(steps: list[tuple[int, float]]) -> None:
    cost = estimate_of(steps).cost
    if cost is not None:
        assert cost.fixed_s > 0
        assert cost.token_s > 0


# What it leaves.


def limit(num_decodes: int, num_queued_tokens: int, fixed_s: float = FIXED_S, token_s: float = TOKEN_S) -> int | None:
    """Prompt tokens on a machine that takes so long for each step and each token."""
    share = PrefillShare(max_slowdown=1.75, max_wait_s=2.0)
    for num_tokens in (512, 8):
        share.record(num_tokens, fixed_s + token_s * num_tokens)
    return share.max_tokens(num_decodes, num_queued_tokens)


def test_no_limit_without_decodes_or_knowledge() -> None:
    assert limit(0, 1024) is None
    assert PrefillShare(max_slowdown=1.75, max_wait_s=2.0).max_tokens(8, 1024) is None


def test_a_mixed_step_takes_at_most_so_many_times_as_long() -> None:
    # 8 decodes take 7 ms, and 0.75 of that pays for 21 tokens.
    assert limit(8, 1024) == 21
    assert duration(8 + 21) <= 1.75 * duration(8)


def test_more_join_where_the_queue_would_take_too_long() -> None:
    # 4096 tokens take 1.024 s by themselves; 0.976 s are left for the decodes of their steps, 7 ms each: 139 steps.
    assert limit(8, 4096) == 29
    assert 139 * 29 < 4096 < 140 * 30


def test_decodes_keep_a_third_of_the_time_however_long_the_queue() -> None:
    assert limit(8, 100_000) == 56
    assert duration(8 + 56) <= 3 * duration(8)


def test_prompts_never_stand_still() -> None:
    # A machine on which the weights cost next to nothing: one decode takes as long as one token.
    assert limit(1, 100, fixed_s=1e-6, token_s=0.001) == 16
