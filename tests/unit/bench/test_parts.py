"""What the bench's other parts make of what they measured."""

import pytest

from bench.engine import mixed, overhead, start
from bench.engine.overhead import StepTimes
from bench.engine.throughput import share_equal


def test_the_mixture_adds_the_shares_of_both_loads() -> None:
    figures = mixed.summarise(
        gaps_s=[0.01] * 98 + [0.03, 0.04],
        decode_mixed=60.0,
        decode_alone=120.0,
        prefill_mixed=300.0,
        prefill_alone=1000.0,
    )
    assert figures["share_of_alone"] == pytest.approx(0.8)
    assert figures["itl_p50_ms"] == pytest.approx(10)
    assert figures["itl_p99_ms"] == pytest.approx(40)
    assert figures["itl_p99_over_p50"] == pytest.approx(4)


def test_percentiles() -> None:
    values = [3.0, 1.0, 2.0, 4.0]
    assert mixed.percentile(values, 0.5) == 3.0
    assert mixed.percentile(values, 0.99) == 4.0
    assert mixed.percentile([1.0], 0.99) == 1.0


def test_gaps_are_those_within_the_time_and_a_stream() -> None:
    decoding = mixed.Decoding()
    decoding.arrivals_s[0] = [1.0, 2.0, 4.0, 8.0]
    decoding.arrivals_s[1] = [2.5, 3.0]
    assert sorted(decoding.gaps_s(1.5, 5.0)) == [0.5, 2.0]
    assert decoding.time_of(3) == 2.5


def test_the_overhead_is_all_but_the_model() -> None:
    quick = StepTimes(schedule=1e-6, batch=2e-6, model=90e-6, sampling=3e-6, update=4e-6)
    slow = StepTimes(schedule=3e-6, batch=2e-6, model=90e-6, sampling=3e-6, update=2e-6)
    figures = overhead.summarise([quick, slow])
    assert figures["schedule_us"] == pytest.approx(2)
    assert figures["step_us"] == pytest.approx(100)
    assert figures["overhead_share"] == pytest.approx(0.1)


def test_the_phases_of_a_start_are_differences() -> None:
    run = {"entered": 0.1, "imported": 1.1, "loaded": 3.1, "first_token": 3.2}
    figures = start.summarise([run, {phase: 2 * end for phase, end in run.items()}, run])
    assert figures == pytest.approx(
        {"total_s": 3.2, "interpreter_s": 0.1, "imports_s": 1.0, "load_s": 2.0, "first_step_s": 0.1}
    )


def test_share_of_equal_tokens() -> None:
    assert share_equal([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
