"""Plans follow from what was measured, and none is dearer than computing."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.costs import DISK, HOST, SHUN_S, Plan, Speeds, cheapest

BLOCK_BYTES = 1 << 20
SIZE = 16
MANY = 64 * BLOCK_BYTES


def speeds(token_s: float = 1e-3, **bytes_per_s: float) -> Speeds:
    """Speeds that were measured once each, about these."""
    result = Speeds(lambda: token_s)
    for origin, rate in bytes_per_s.items():
        result.note_load(origin, MANY, MANY / rate)
    return result


def plan(known: Speeds, num_missing: int, own: list[str], sources: list[tuple[str, int]]) -> Plan:
    return cheapest(known, num_missing=num_missing, own=own, sources=sources, block_bytes=BLOCK_BYTES, block_size=SIZE)


rates = st.floats(1e5, 1e11)
tiers = st.lists(st.sampled_from([HOST, DISK]), max_size=40)
holders = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(-5, 60)), max_size=3)


@given(st.floats(1e-7, 1.0), rates, rates, rates, st.integers(0, 40), tiers, holders)
def test_no_plan_is_dearer_than_computing(
    token_s: float, host: float, disk: float, remote: float, num_missing: int, own: list[str],
    sources: list[tuple[str, int]],
) -> None:  # fmt: skip
    known = speeds(token_s, host=host, disk=disk, a=remote)
    chosen = plan(known, num_missing, own, sources)
    assert chosen.seconds <= known.compute_s(num_missing * SIZE)
    assert chosen.num_own in (0, min(len(own), num_missing))
    if chosen.source is not None:
        assert sources[chosen.source][1] > chosen.num_own, "fetches what is there already"


@given(rates, st.floats(1.0, 100.0), st.integers(1, 40), tiers, holders, st.sampled_from(["host", "disk", "a"]))
def test_a_faster_origin_never_makes_a_plan_take_longer(
    rate: float, factor: float, num_missing: int, own: list[str], sources: list[tuple[str, int]], origin: str
) -> None:
    slower = plan(speeds(**{origin: rate}), num_missing, own, sources)
    faster = plan(speeds(**{origin: rate * factor}), num_missing, own, sources)
    # Measured speeds are rounded.
    assert faster.seconds <= slower.seconds * (1 + 1e-9)


@given(st.floats(1e-6, 1e-2), st.floats(1.0, 100.0), st.integers(1, 40), tiers, holders)
def test_slower_computing_never_brings_less(
    token_s: float, factor: float, num_missing: int, own: list[str], sources: list[tuple[str, int]]
) -> None:
    def num_brought(token_s: float) -> int:
        chosen = plan(speeds(token_s), num_missing, own, sources)
        held = sources[chosen.source][1] if chosen.source is not None else chosen.num_own
        return min(held, num_missing)

    assert num_brought(token_s * factor) >= num_brought(token_s)


def test_the_cheapest_of_all_combinations_is_taken() -> None:
    known = speeds(1e-3, host=1e10, disk=1e8, fast=1e9, slow=1e7)
    # 20 blocks: 10 in host memory here, 20 at each other holder.
    chosen = plan(known, 20, [HOST] * 10, [("slow", 20), ("fast", 20)])
    assert (chosen.num_own, chosen.source) == (10, 1)
    # From a disk this slow, all is better fetched.
    chosen = plan(known, 20, [DISK] * 10, [("fast", 20)])
    assert (chosen.num_own, chosen.source) == (0, 0)
    # Nobody is worth asking where computing is fast.
    assert plan(speeds(1e-9), 20, [HOST] * 10, [("fast", 20)]) == Plan(0, None, 20 * SIZE * 1e-9)


def test_equal_times_compute() -> None:
    assert plan(speeds(), 0, [], [("a", 0)]) == Plan(0, None, 0.0)


def test_what_fails_is_left_alone_for_a_while() -> None:
    now = itertools.count(0, SHUN_S / 2)
    known = Speeds(lambda: 1.0, lambda: next(now))
    known.note_failure("a")
    assert plan(known, 10, [], [("a", 10)]).source is None
    assert plan(known, 10, [], [("a", 10)]).source == 0, "for good"


def test_another_source_takes_its_place() -> None:
    known = speeds(1.0, a=1e9, b=1e6)
    assert plan(known, 10, [], [("b", 10), ("a", 10)]).source == 1
    known.note_failure("a")
    assert plan(known, 10, [], [("b", 10), ("a", 10)]).source == 0


def test_measurements_are_learned_and_small_ones_are_not() -> None:
    known = Speeds(lambda: 1.0)
    guess = known.load_s("a", MANY)
    known.note_load("a", 1000, 100.0)
    assert known.load_s("a", MANY) == guess
    known.note_load("a", MANY, 10.0)
    assert known.load_s("a", MANY) == pytest.approx(10.0, rel=0.01)
    for _ in range(20):
        known.note_load("a", MANY, 1.0)
    assert known.load_s("a", MANY) == pytest.approx(1.0, rel=0.05)
    assert known.load_s("b", MANY) == guess, "of another source"


def test_computing_is_guessed_until_it_was_measured() -> None:
    measured = 0.0
    known = Speeds(lambda: measured)
    assert known.compute_s(1000) > 0
    measured = 1e-6
    assert known.compute_s(1000) == pytest.approx(1e-3)
