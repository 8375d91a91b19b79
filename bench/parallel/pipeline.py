"""One prompt in one step over the two stages of a pipeline, cut into micro-batches, beside the ideal.

    alone     the whole model on one rank, the same micro-batches one after the other
    apart     two engines at once, each with half of the layers, computing all micro-batches without waiting: as fast as
              two stages can be here, where cores share what they share
    pipeline  the two stages

A stage that has all its M micro-batches at hand takes as long as `apart`. A pipeline of P stages has to be filled and
emptied: ideally it takes (P + M - 1) / M times that.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import torch

from bench.engine.batches import BLOCK_SIZE, plain_batch
from bench.parallel.models import cached_llama
from engine.assembly import assemble
from engine.batch import Batch
from engine.config import EngineConfig
from engine.loader import load_model
from engine.model_config import ModelConfig
from engine.parallel.leader import Leader
from engine.parallel.spawn import spawned_group

STAGES = 2
MICRO_BATCHES = (1, 2, 4, 8)
_ROOT = Path(__file__).resolve().parents[2]

Step = Callable[[Batch], None]


@dataclass(slots=True)
class Times:
    """Seconds of a step in each round."""

    alone: list[float]
    apart: list[float]
    pipeline: list[float]


def measure(
    model: ModelConfig, dtype: str, *, prompts: tuple[int, ...], rounds: int, say: Callable[[str], None]
) -> dict[int, dict[int, Times]]:
    """By tokens of the prompt and number of micro-batches. A round before those that count warms up."""
    assert model.num_layers % STAGES == 0, f"{model.name} has no equal stages"
    half = replace(model, name=f"{model.name}-half", num_layers=model.num_layers // STAGES)
    longest = max(prompts)
    config = EngineConfig(
        model=str(cached_llama(model, dtype)),
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
    stage_config = replace(config, model=str(cached_llama(half, dtype)))
    torch.set_num_threads(1)
    found = {prompt: {parts: Times([], [], []) for parts in MICRO_BATCHES} for prompt in prompts}
    with ExitStack() as stack:
        say("loading a model for each number of micro-batches")
        whole = stack.enter_context(_Engine(config))
        stages = [stack.enter_context(_Engine(stage_config)) for _ in range(STAGES)]
        pipelines = {parts: _pipeline(replace(config, micro_batches=parts), stack) for parts in MICRO_BATCHES}
        for engine in (whole, *stages):
            engine.wait_ready()
        for prompt in prompts:
            batch = plain_batch([prompt], [0])
            for number in range(rounds + 1):
                for parts, times in found[prompt].items():
                    say(f"{prompt} tokens, round {number} of {rounds}, {parts} micro-batches")
                    alone = _at_once([whole], prompt, parts)
                    apart = _at_once(stages, prompt, parts)
                    began = perf_counter()
                    pipelines[parts](batch)
                    pipeline = perf_counter() - began
                    if number:
                        times.alone.append(alone)
                        times.apart.append(apart)
                        times.pipeline.append(pipeline)
    return found


class _Engine:
    """A process of bench/parallel/stage.py; ends with the context."""

    def __init__(self, config: EngineConfig) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.parallel.stage", json.dumps(asdict(config))],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "_Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()

    def wait_ready(self) -> None:
        self._hear()

    def begin(self, prompt: int, parts: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"tokens": prompt, "micro_batches": parts}) + "\n")
        self._process.stdin.flush()

    def seconds(self) -> float:
        return self._hear()["seconds"]

    def _hear(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("an engine's process ended; see above what it printed")
        said: dict[str, float] = json.loads(line)
        return said


def _at_once(engines: list[_Engine], prompt: int, parts: int) -> float:
    for engine in engines:
        engine.begin(prompt, parts)
    return max([engine.seconds() for engine in engines])


def _pipeline(config: EngineConfig, stack: ExitStack) -> Step:
    group = stack.enter_context(spawned_group(config, pp=STAGES))
    leader = assemble(config, load_model, lambda done, total: None, group=group).core._runner._executor
    assert isinstance(leader, Leader)

    @torch.inference_mode()
    def step(batch: Batch) -> None:
        leader.run(batch)
        leader.logits(0)

    return step
