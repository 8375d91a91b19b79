"""Decode speed by tensor-parallel degree, and as fast as so many ranks could be on this machine.

    alone     the whole model on one rank, which is in no group
    together  the group: each rank computes its part of every layer, and they add up
    apart     as many engines at once, each alone with a model as large as one rank's part: no sums, no waiting

All are alive at once and take turns; ranks that have nothing to do sleep.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from bench.parallel.groups import Group
from bench.parallel.leading import Leading
from bench.parallel.models import cached_llama, slice_of
from engine.model_config import ModelConfig

PROMPT_TOKENS = 256
_BLOCK_SIZE = 16
_MAX_LEN = 1024
_STEPS = 8


@dataclass(slots=True)
class Turns:
    """Seconds of one step in each round, at one number of running requests."""

    alone: list[float]
    together: list[float]
    apart: list[float]


def measure(
    model: ModelConfig, tp: int, dtype: str, *, batches: tuple[int, ...], rounds: int, say: Callable[[str], None]
) -> dict[int, Turns]:
    """By number of running requests. A round before those that count warms up."""
    assert len(batches) * (rounds + 1) * _STEPS + PROMPT_TOKENS < _MAX_LEN, "the requests would end meanwhile"
    whole = Leading(
        tp=0,
        model=str(cached_llama(model, dtype)),
        dtype=dtype,
        prompt_tokens=PROMPT_TOKENS,
        max_num_seqs=max(batches),
        num_blocks=max(batches) * _MAX_LEN // _BLOCK_SIZE,
        max_len=_MAX_LEN,
    )
    part = replace(whole, model=str(cached_llama(slice_of(model, tp), dtype)))
    with ExitStack() as stack:

        def start(leading: Leading) -> Group:
            group = stack.enter_context(Group(leading))
            group.wait_ready()
            return group

        say(f"{model.name}: loading")
        ways = {
            "alone": [start(whole)],
            "together": [start(replace(whole, tp=tp))],
            "apart": [start(part) for _ in range(tp)],
        }
        return {batch: _take_turns(ways, batch, rounds, lambda what: say(f"{model.name}: {what}")) for batch in batches}


def _take_turns(ways: dict[str, list[Group]], batch: int, rounds: int, say: Callable[[str], None]) -> Turns:
    for name, groups in ways.items():
        say(f"{batch} prompts of {PROMPT_TOKENS} tokens, {name}")
        for group in groups:
            group.decode(batch)
    turns = Turns([], [], [])
    names = list(ways)
    for number in range(rounds + 1):
        # Another one is first each time: none always follows the same neighbour.
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            say(f"{batch} requests, round {number} of {rounds}, {name}")
            for group in ways[name]:
                group.begin(_STEPS)
            # Ranks that wait for each other at every layer are as fast as the slowest.
            seconds = max([group.seconds() for group in ways[name]])
            if number:
                getattr(turns, name).append(seconds / _STEPS)
    return turns
