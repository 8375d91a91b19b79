"""Exhaustive exploration of a model, breadth first: every state that any order of steps leads to.

A model names its steps; a step is either one that will happen if nothing else does, or a fault, which may happen. Where
a step breaks a rule it raises Violation, or fails an assertion of the code that is explored. What is checked besides:

- A state from which no step but a fault leads on is a quiet end.
- No chain of steps comes back to where it was. As the states are finitely many, every run comes to a quiet end then,
  whatever the order: nobody waits for ever, and nothing goes round in circles.
"""

from array import array
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

State = TypeVar("State", bound=Hashable)
StateInvariant = TypeVar("StateInvariant", bound=Hashable)


class Violation(Exception):
    """A step broke a rule."""


class Step(NamedTuple):
    """What happens, for people to read: the name of a step and what it concerns."""

    name: str
    subjects: tuple[object, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.name, *map(str, self.subjects)))


class Model(Protocol[StateInvariant]):
    """What can be explored."""

    def start(self) -> StateInvariant: ...

    def steps(self, state: StateInvariant) -> "Iterator[tuple[Step, StateInvariant]]":
        """What will happen unless something else does first. Raises Violation."""
        ...

    def faults(self, state: StateInvariant) -> "Iterator[tuple[Step, StateInvariant]]":
        """What may happen or not. Raises Violation."""
        ...

    def check_quiet(self, state: StateInvariant) -> None:
        """Raises Violation where nothing more will happen in `state`, yet something is left over."""
        ...


@dataclass(frozen=True, slots=True)
class Explored(Generic[State]):
    """What an exploration saw, where nothing was wrong.

    Attributes:
        num_states: All of them.
        num_steps: Steps and faults that lead from one to another.
        depth: Steps of the longest of the shortest ways to a state.
        quiet: The states that are quiet ends.
    """

    num_states: int
    num_steps: int
    depth: int
    quiet: tuple[State, ...]

    def __str__(self) -> str:
        return (
            f"{self.num_states} states, {self.num_steps} steps between them, {len(self.quiet)} quiet ends, "
            f"each state at most {self.depth} steps from the start"
        )


class Found(AssertionError):
    """A violation, with a shortest way to it."""

    def __init__(self, problem: str, trace: list[Step], last: object) -> None:
        lines = [problem, "", *(f"{number:4d}  {step}" for number, step in enumerate(trace, 1)), "", "from", f"{last}"]
        super().__init__("\n".join(lines))
        self.problem = problem
        self.trace = trace


def explore(model: Model[State], max_states: int) -> Explored[State]:
    """Explores all of `model`.

    Raises Found where it breaks a rule; ValueError where it has more than `max_states`: bound it more closely then.
    """
    start = model.start()
    states = [start]
    numbers = {start: 0}
    parents = array("q", [-1])
    reached_by: list[Step | None] = [None]
    depths = array("q", [0])
    # Of each state, the numbers of those that follow; one after the other, as there are millions.
    followers = array("q")
    bounds = array("q", [0])
    quiet = []

    def trace_to(number: int) -> list[Step]:
        trace = []
        while (step := reached_by[number]) is not None:
            trace.append(step)
            number = parents[number]
        return trace[::-1]

    number = 0
    while number < len(states):
        state = states[number]
        stuck = True
        try:
            for move in (model.steps, model.faults):
                for step, after in move(state):
                    stuck = stuck and move == model.faults
                    known = numbers.setdefault(after, len(states))
                    if known == len(states):
                        states.append(after)
                        parents.append(number)
                        reached_by.append(step)
                        depths.append(depths[number] + 1)
                    followers.append(known)
            if stuck:
                model.check_quiet(state)
                quiet.append(state)
        except (Violation, AssertionError) as problem:
            raise Found(str(problem), trace_to(number), state) from problem
        bounds.append(len(followers))
        if len(states) > max_states:
            raise ValueError(f"more than {max_states} states; choose closer bounds")
        number += 1
    round_again = _on_a_circle(followers, bounds)
    if round_again is not None:
        raise Found("a chain of steps comes back to this state", trace_to(round_again), states[round_again])
    return Explored(len(states), len(followers), max(depths), tuple(quiet))


def _on_a_circle(followers: "array[int]", bounds: "array[int]") -> int | None:
    """A state on a circle, or behind one; None where there is no circle. Takes away states that nothing leads to."""
    num_before = array("q", bytes(8 * (len(bounds) - 1)))
    for follower in followers:
        num_before[follower] += 1
    free = deque(number for number, count in enumerate(num_before) if not count)
    while free:
        number = free.popleft()
        for follower in followers[bounds[number] : bounds[number + 1]]:
            num_before[follower] -= 1
            if not num_before[follower]:
                free.append(follower)
    return next((number for number, count in enumerate(num_before) if count), None)
