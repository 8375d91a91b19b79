"""Where the time of a step goes on a CPU: each kind of operation of the kernels, all layers together."""

import statistics
import time
from collections import defaultdict

import numpy as np
import torch

from engine.assembly import assemble
from engine.batch import Batch
from engine.config import EngineConfig
from engine.cpu.executor import CpuExecutor
from engine.cpu.library import Finish, Kind, Operation
from engine.executor import OneProcess
from engine.loader import load_model
from pdmesh.errors import ConfigError

CONTEXT = 200
_REPEATS = 9
_NAMES = {
    Kind.EMBED: "embedding",
    Kind.NORMALIZE: "norms",
    Kind.ATTEND: "attention",
    Kind.SELECT: "rows selected",
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
    report = {f"prefill_{length}": _times(executor, _batch([length], [0])) for length in prompts}
    report |= {f"decode_b{count}": _times(executor, _batch([1] * count, [CONTEXT] * count)) for count in decodes}
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
        for operation in executor._segments[0][0]:
            began = time.perf_counter()
            executor._run(executor._step(batch), (Operation * 1)(operation), executor._model.num_weights)
            sums[_name(operation)] += time.perf_counter() - began
        for name, total in sums.items():
            seconds[name].append(total)
    return {f"{name}_ms": 1e3 * statistics.median(times) for name, times in seconds.items()}


def _name(operation: Operation) -> str:
    """Products by their shape and what becomes of them."""
    if operation.kind != Kind.PROJECT:
        return _NAMES[operation.kind]
    finish = {Finish.STORE: "", Finish.ADD: ", added", Finish.SILU_MULTIPLY: ", SiLU", Finish.ROTATE: ", turned"}[
        operation.finish
    ]
    return f"product {operation.k} to {operation.n}{finish}"


def _batch(query_lens: list[int], context_lens: list[int]) -> Batch:
    """Sequences with blocks of their own, one after the other; what lies in them matters to nobody."""
    block_size = 16
    queries = np.array(query_lens, np.int64)
    seq_lens = queries + context_lens
    max_blocks = int(-(-seq_lens.max() // block_size))
    tables = np.arange(len(queries) * max_blocks).reshape(len(queries), max_blocks)
    positions = np.concatenate([np.arange(end - count, end) for count, end in zip(queries, seq_lens, strict=True)])
    owners = np.repeat(np.arange(len(queries)), queries)
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    return Batch(
        input_ids=torch.from_numpy(positions),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        query_lens=queries,
        seq_lens=seq_lens,
        block_tables=torch.from_numpy(tables),
        output_lens=np.ones_like(queries),
    )
