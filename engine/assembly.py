"""From a config to an engine that can be stepped: the model, then a KV cache in the memory which that leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.config import EngineConfig, available_memory_bytes, cache_size
from engine.core import EngineCore
from engine.cpu.executor import CpuExecutor, cpu_layout, load_kernels
from engine.executor import ModelExecutor, TorchExecutor
from engine.kv_cache import PLAIN, KVCache, bytes_per_block
from engine.loader import DTYPES, LoadedModel
from engine.runner import ModelRunner
from engine.scheduler import Scheduler, SchedulerConfig
from pdmesh.types import ModelInfo, PairingFacts


class ModelLoader(Protocol):
    """`engine.loader.load_model`, or what stands in for it."""

    def __call__(
        self, source: str, dtype: str, device: torch.device, on_progress: Callable[[int, int], None]
    ) -> LoadedModel: ...


@dataclass(frozen=True, slots=True)
class Assembly:
    """A core, and what those outside its thread may know of it."""

    core: EngineCore
    kv_cache: KVCache
    model: ModelInfo
    facts: PairingFacts


def assemble(config: EngineConfig, load: ModelLoader, on_progress: Callable[[int, int], None]) -> Assembly:
    """Loads the model and makes an engine around it. Raises ConfigError before it allocates what cannot fit."""
    device = config.torch_device
    loaded = load(config.model, config.dtype_name, device, on_progress)
    shape = loaded.config
    dtype = DTYPES[config.dtype_name]
    block_bytes = bytes_per_block(shape, config.block_size, dtype)
    size = cache_size(config, block_bytes, shape.max_position, available_memory_bytes(device))
    layout = cpu_layout(shape, config.block_size, dtype) if device.type == "cpu" else None
    kv_cache = KVCache(
        shape,
        num_blocks=size.num_blocks,
        block_size=config.block_size,
        dtype=dtype,
        device=device,
        layout=layout or PLAIN,
    )
    scheduler_config = SchedulerConfig(
        num_blocks=size.num_blocks,
        block_size=config.block_size,
        max_model_len=size.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_prefill_chunk=config.max_prefill_chunk,
    )
    runner = ModelRunner(
        _executor(config, loaded, kv_cache, size.max_model_len),
        device=device,
        block_size=config.block_size,
        vocab_size=shape.vocab_size,
        num_seats=config.max_num_seqs,
        max_blocks=scheduler_config.max_request_blocks,
    )
    return Assembly(
        core=EngineCore(Scheduler(scheduler_config), runner),
        kv_cache=kv_cache,
        model=ModelInfo(loaded.name, shape.architecture, shape.vocab_size, size.max_model_len),
        facts=PairingFacts(
            model_digest=loaded.digest,
            dtype=config.dtype_name,
            kv_dtype=config.dtype_name,
            block_size=config.block_size,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            kv_layout=kv_cache.layout.name,
        ),
    )


def _executor(config: EngineConfig, loaded: LoadedModel, kv_cache: KVCache, max_model_len: int) -> ModelExecutor:
    if config.kernels == "auto" and kv_cache.layout != PLAIN and (kernels := load_kernels(kv_cache.dtype)):
        return CpuExecutor(
            kernels,
            loaded.model,
            loaded.config,
            kv_cache,
            max_tokens=config.max_num_batched_tokens,
            max_position=max_model_len,
            num_threads=torch.get_num_threads(),
        )
    return TorchExecutor(loaded.model, kv_cache)
