"""Where the time of a step goes on a CPU: each kind of operation of the kernels, all layers together."""

import ctypes
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

from bench.engine.batches import plain_batch
from engine.assembly import assemble
from engine.batch import Batch
from engine.config import EngineConfig
from engine.cpu.executor import CpuExecutor, step_of
from engine.cpu.library import Finish, Kind, Operation
from engine.executor import OneProcess
from engine.loader import load_model
from pdmesh.errors import ConfigError

CONTEXT = 200
_REPEATS = 9
_NAMES = {
    Kind.EMBED: "embedding",
    Kind.ADD_POSITIONS: "embedding",
    Kind.RMS_NORM: "norms",
    Kind.LAYER_NORM: "norms",
    Kind.FINISH_HEADS: "norms",
    Kind.NARROW: "norms",
    Kind.ATTEND: "attention",
    Kind.SELECT: "rows selected",
    Kind.ROUTE: "experts",
}


def measure(config: EngineConfig, *, prompts: tuple[int, ...], decodes: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Milliseconds by operation, of one prompt of each length and of as many decodes after CONTEXT tokens each.

    `layers` is a whole forward pass; that its operations add up to more is the price of running them one by one.
    Raises ConfigError where the kernels do not serve the model.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    process = assemble(config, load_model, lambda done, total: None).core._runner._executor
    executor = process._executor if isinstance(process, OneProcess) else None
    if not isinstance(executor, CpuExecutor):
        raise ConfigError("there are no operations to time: the CPU kernels do not serve this model here")
    report = {f"prefill_{length}": _times(executor, plain_batch([length], [0])) for length in prompts}
    report |= {f"decode_b{count}": _times(executor, plain_batch([1] * count, [CONTEXT] * count)) for count in decodes}
    return report


def _times(executor: CpuExecutor, batch: Batch) -> dict[str, float]:
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(_REPEATS):
        began = time.perf_counter()
        hidden = executor.forward(batch)
        passed = time.perf_counter()
        executor.logits(hidden)
        seconds["layers"].append(passed - began)
        seconds["logits"].append(time.perf_counter() - passed)
        sums: dict[str, float] = defaultdict(float)
        for operations in _runs(executor._segments[0].operations):
            began = time.perf_counter()
            executor._run(step_of(batch), operations, executor._model.num_weights)
            sums[_name(operations[0])] += time.perf_counter() - began
        for name, total in sums.items():
            seconds[name].append(total)
    return {f"{name}_ms": 1e3 * statistics.median(times) for name, times in seconds.items()}


def _runs(operations: "ctypes.Array[Operation]") -> "Iterator[ctypes.Array[Operation]]":
    """Single operations; those of a mixture together, whose routing lives as long as a run."""
    run: list[Operation] = []
    for operation in operations:
        run.append(operation)
        if run[0].kind != Kind.ROUTE or operation.kind == Kind.COMBINE_EXPERTS:
            yield (Operation * len(run))(*run)
            run = []


def _name(operation: Operation) -> str:
    """Products by their shape and what becomes of them."""
    if operation.kind != Kind.PROJECT:
        return _NAMES[operation.kind]
    finish = {
        Finish.STORE: "",
        Finish.ADD: ", added",
        Finish.NARROW: "",
        Finish.ACTIVATE: ", activated",
        Finish.ACTIVATE_MULTIPLY: ", gated",
        Finish.PROJECT_HEADS: ", turned",
    }[operation.finish]
    return f"product {operation.k} to {operation.n}{finish}"
