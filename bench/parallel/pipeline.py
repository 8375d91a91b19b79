"""One prompt in one step over the two stages of a pipeline, cut into micro-batches, in turns with one rank alone.

The ideal is taken from one rank that holds the whole model and computes the same micro-batches one after the other: a
stage's work on one of them is that time over (stages * micro-batches), and the pipeline takes as many times that as
stages + micro-batches - 1. What small micro-batches cost is thus in the ideal; what the stages' uneven work, their talk
and the memory that they share cost is not.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch

from bench.engine.batches import BLOCK_SIZE, plain_batch
from engine.assembly import assemble
from engine.batch import Batch
from engine.config import EngineConfig
from engine.executor import OneProcess
from engine.loader import load_model
from engine.parallel.batches import micro_batches
from engine.parallel.leader import Leader
from engine.parallel.rank import MIN_MICRO_BATCH_TOKENS
from engine.parallel.spawn import spawned_group

STAGES = 2
MICRO_BATCHES = (1, 2, 4, 8)

Step = Callable[[Batch], None]


@dataclass(slots=True)
class Times:
    """Seconds of a step in each round."""

    alone: list[float]
    pipeline: list[float]


def measure(
    model: Path, dtype: str, *, prompts: tuple[int, ...], rounds: int, say: Callable[[str], None]
) -> dict[int, dict[int, Times]]:
    """By tokens of the prompt and number of micro-batches. A round before those that count warms up."""
    longest = max(prompts)
    config = EngineConfig(
        model=str(model),
        dtype=dtype,
        device="cpu",
        block_size=BLOCK_SIZE,
        num_threads=1,
        num_blocks=-(-longest // BLOCK_SIZE),
        max_model_len=longest,
        max_num_seqs=1,
        max_num_batched_tokens=longest,
        max_prefill_chunk=longest,
    )
    torch.set_num_threads(1)
    found = {prompt: {parts: Times([], []) for parts in MICRO_BATCHES} for prompt in prompts}
    with ExitStack() as stack:
        say("loading a model for each number of micro-batches")
        alone = _alone(config)
        pipelines = {parts: _pipeline(replace(config, micro_batches=parts), stack) for parts in MICRO_BATCHES}
        for prompt in prompts:
            batch = plain_batch([prompt], [0])
            for number in range(rounds + 1):
                for parts, times in found[prompt].items():
                    say(f"{prompt} tokens, round {number} of {rounds}, {parts} micro-batches")
                    ways = [(times.alone, alone[parts]), (times.pipeline, pipelines[parts])]
                    for seconds, step in ways if number % 2 else ways[::-1]:
                        began = perf_counter()
                        step(batch)
                        if number:
                            seconds.append(perf_counter() - began)
    return found


def _alone(config: EngineConfig) -> dict[int, Step]:
    process = assemble(config, load_model, lambda done, total: None).core._runner._executor
    # As in bench/engine: the whole model, without what schedules and samples.
    assert isinstance(process, OneProcess)
    executor = process._executor

    def cut(parts: int) -> Step:
        @torch.inference_mode()
        def step(batch: Batch) -> None:
            for _, micro_batch in micro_batches(batch, parts, MIN_MICRO_BATCH_TOKENS):
                hidden = executor.forward(micro_batch)
            executor.logits(hidden)

        return step

    return {parts: cut(parts) for parts in MICRO_BATCHES}


def _pipeline(config: EngineConfig, stack: ExitStack) -> Step:
    group = stack.enter_context(spawned_group(config, pp=STAGES))
    leader = assemble(config, load_model, lambda done, total: None, group=group).core._runner._executor
    assert isinstance(leader, Leader)

    @torch.inference_mode()
    def step(batch: Batch) -> None:
        leader.run(batch)
        leader.logits(0)

    return step
