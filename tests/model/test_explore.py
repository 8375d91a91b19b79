"""The explorer itself, on models of a few numbers."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.model.explore import Found, Step, Violation, explore


@dataclass(frozen=True)
class Numbers:
    """Implements explore.Model: from a number, steps and faults lead to others."""

    leads_to: dict[int, tuple[int, ...]]
    may_lead_to: dict[int, tuple[int, ...]]
    quiet: frozenset[int]
    forbidden: int = -1

    def start(self) -> int:
        return 0

    def steps(self, state: int) -> Iterator[tuple[Step, int]]:
        for after in self.leads_to.get(state, ()):
            if after == self.forbidden:
                raise Violation(f"{after} is forbidden")
            yield Step("to", (after,)), after

    def faults(self, state: int) -> Iterator[tuple[Step, int]]:
        for after in self.may_lead_to.get(state, ()):
            yield Step("fault to", (after,)), after

    def check_quiet(self, state: int) -> None:
        if state not in self.quiet:
            raise Violation(f"{state} is not quiet")


def test_every_state_is_seen_once() -> None:
    model = Numbers({0: (1, 2), 1: (3,), 2: (3,)}, {0: (4,), 3: (4,)}, frozenset({3, 4}))
    explored = explore(model, 5)
    assert (explored.num_states, explored.num_steps, explored.depth) == (5, 6, 2)
    assert set(explored.quiet) == {3, 4}


def test_a_shortest_way_to_a_violation_is_told() -> None:
    model = Numbers({0: (1, 2), 1: (3,), 3: (2,), 2: (9,)}, {}, frozenset(), forbidden=9)
    with pytest.raises(Found) as found:
        explore(model, 5)
    assert found.value.problem == "9 is forbidden"
    assert found.value.trace == [Step("to", (2,))]
    assert "   1  to 2\n" in str(found.value)


def test_who_can_only_hope_for_a_fault_is_stuck() -> None:
    model = Numbers({0: (1,)}, {1: (2,)}, frozenset({2}))
    with pytest.raises(Found, match="1 is not quiet"):
        explore(model, 5)


def test_a_way_round_in_circles_is_found() -> None:
    model = Numbers({0: (1,), 1: (2, 3), 2: (1,)}, {}, frozenset({3}))
    with pytest.raises(Found, match="comes back") as found:
        explore(model, 5)
    assert found.value.trace == [Step("to", (1,))]


def test_too_large_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 states"):
        explore(Numbers({number: (number + 1,) for number in range(9)}, {}, frozenset()), 3)
