"""What a KV cache in 8 bits costs and saves at long contexts: attention and whole steps beside the model's own type."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench.engine.batches import BLOCK_SIZE, plain_batch
from engine.assembly import assemble
from engine.batch import Batch
from engine.config import EngineConfig
from engine.cpu.executor import CpuExecutor, step_of
from engine.cpu.library import Kind, Operation
from engine.executor import OneProcess
from engine.kv_cache import KVCache
from engine.loader import load_model
from pdmesh.errors import ConfigError

KV_TYPES = ("auto", "int8")


@dataclass(frozen=True, slots=True)
class Point:
    """`num_sequences` decodes, each with `context` tokens before it."""

    num_sequences: int
    context: int

    @property
    def name(self) -> str:
        return f"b{self.num_sequences}_{self.context}"


def measure(config: EngineConfig, points: Sequence[Point], rounds: int) -> dict[str, dict[str, float]]:
    """By KV type: bytes of a token's KV, and of each point milliseconds of attention and of all layers, of one thread.

    The types take turns; of `rounds` turns the least counts. Time in which the thread was off its core does not.
    Raises ConfigError where the kernels do not serve the model.
    """
    torch.set_num_threads(1)
    needed = max(point.num_sequences * -(-(point.context + 1) // BLOCK_SIZE) for point in points)
    config = replace(
        config, num_threads=1, num_blocks=needed, max_num_seqs=max(point.num_sequences for point in points)
    )
    report: dict[str, dict[str, float]] = {}
    executors: dict[str, CpuExecutor] = {}
    for name in KV_TYPES:
        assembly = assemble(replace(config, kv_cache_dtype=name), load_model, lambda done, total: None)
        process = assembly.core._runner._executor
        executor = process._executor if isinstance(process, OneProcess) else None
        if not isinstance(executor, CpuExecutor):
            raise ConfigError("there is no attention to time: the CPU kernels do not serve this model here")
        _fill(assembly.kv_cache)
        executors[name] = executor
        report[name] = {"bytes_per_token": assembly.kv_cache.block_bytes / BLOCK_SIZE}
    for point in points:
        batch = plain_batch([1] * point.num_sequences, [point.context] * point.num_sequences)
        for _ in range(rounds):
            for name, executor in executors.items():
                for part, seconds in _times(executor, batch).items():
                    key = f"{point.name}_{part}_ms"
                    report[name][key] = min(report[name].get(key, 1e9), 1e3 * seconds)
    return report


def _fill(kv_cache: KVCache) -> None:
    """Memory that was never written is one page of zeros, read from the caches."""
    kv_cache.data.fill_(1)
    if kv_cache.scales is not None:
        kv_cache.scales.fill_(0.01)


def _times(executor: CpuExecutor, batch: Batch) -> dict[str, float]:
    began = time.thread_time()
    executor.forward(batch)
    passed = time.thread_time()
    attention = 0.0
    for operation in executor._segments[0].operations:
        if operation.kind == Kind.ATTEND:
            start = time.thread_time()
            executor._run(step_of(batch), (Operation * 1)(operation), executor._model.num_weights)
            attention += time.thread_time() - start
    return {"attention": attention, "layers": passed - began}
