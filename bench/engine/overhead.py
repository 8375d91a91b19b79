"""What of a decode step is not the model's work: scheduling, blocks, batch building, sampling, bookkeeping."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.engine.decoding import decoding_core
from engine.batch import Batch
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.executor import StepExecutor

_PROMPT = 64
_STEPS = 96


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step. `schedule` and `update` hold the block pool's work, `model` the layers and the LM head."""

    schedule: float
    batch: float
    model: float
    sampling: float
    update: float


class TimedExecutor:
    """Passes on to an executor that computes on the CPU, and notes when the model's work began and ended."""

    def __init__(self, executor: StepExecutor) -> None:
        self._executor = executor
        self.began_s = self.ended_s = 0.0

    def run(self, batch: Batch) -> None:
        self.began_s = time.perf_counter()
        self._executor.run(batch)

    def logits(self, index: int) -> torch.Tensor:
        logits = self._executor.logits(index)
        self.ended_s = time.perf_counter()
        return logits


def measure(config: EngineConfig, *, num_running: int) -> dict[str, float]:
    """Microseconds of each part of a step in which `num_running` requests decode, and the share of all but the model.

    `config` must allow so many, and name a CPU.
    """
    core = decoding_core(config, num_running=num_running, prompt_tokens=_PROMPT, num_steps=_STEPS)
    # The core is measured as it was assembled, but for this: the one place where the bench reaches into it.
    timed = core._runner._executor = TimedExecutor(core._runner._executor)
    return summarise([_step(core, timed) for _ in range(_STEPS)])


def _step(core: EngineCore, timed: TimedExecutor) -> StepTimes:
    """What EngineCore.step and the engine's thread do, with the clock read in between."""
    scheduler, runner = core.scheduler, core._runner
    began = time.perf_counter()
    plan = scheduler.schedule()
    scheduled = time.perf_counter()
    result = runner.run(plan, runner.build_batch(plan))
    ran = time.perf_counter()
    scheduler.record_duration(plan.num_tokens, ran - scheduled)
    scheduler.update(plan, result)
    scheduler.drain_block_events()
    return StepTimes(
        schedule=scheduled - began,
        batch=timed.began_s - scheduled,
        model=timed.ended_s - timed.began_s,
        sampling=ran - timed.ended_s,
        update=time.perf_counter() - ran,
    )


def summarise(steps: Sequence[StepTimes]) -> dict[str, float]:
    """Means: what happens in few steps, such as a block that is full, counts with its weight."""
    means = {name: statistics.mean(getattr(step, name) for step in steps) for name in StepTimes.__dataclass_fields__}
    total = sum(means.values())
    return {
        **{f"{name}_us": 1e6 * mean for name, mean in means.items()},
        "step_us": 1e6 * total,
        "overhead_share": 1 - means["model"] / total,
    }
