import pytest

from bench.engine.interference import Interference, ProcessorTimes, between


def times(clock: float, all_processes: float, bench: float, measured: float, waiting: float) -> ProcessorTimes:
    return ProcessorTimes(clock, all_processes, bench, measured, waiting)


def test_what_waits_and_what_is_foreign_is_told_apart() -> None:
    seen = between(times(10.0, 100.0, 1.0, 5.0, 7.0), times(12.0, 106.0, 1.5, 8.0, 8.0))
    assert seen.waiting_cores == pytest.approx(0.5)
    assert seen.foreign_cores == pytest.approx(0.75)


def test_ticks_that_are_counted_late_are_not_negative() -> None:
    seen = between(times(0.0, 0.0, 0.0, 0.0, 0.0), times(1.0, 1.9, 0.0, 2.0, 0.0))
    assert seen == Interference(waiting_cores=0.0, foreign_cores=0.0)
