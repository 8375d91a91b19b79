"""From a config to an engine that can be stepped: the model, then a KV cache in the memory which that leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.backend import choose_backend, kv_layout
from engine.config import EngineConfig, available_memory_bytes, cache_size
from engine.core import EngineCore
from engine.kv_cache import KVCache, bytes_per_block
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


def assemble(
    config: EngineConfig, load: ModelLoader, on_progress: Callable[[int, int], None], *, lend_kv: bool = False
) -> Assembly:
    """Loads the model and makes an engine around it. Raises ConfigError before it allocates what cannot fit.

    With `lend_kv`, other processes of this host may be lent the KV cache to read.
    """
    device = config.torch_device
    loaded = load(config.model, config.dtype_name, device, on_progress)
    shape = loaded.config
    dtype = DTYPES[config.dtype_name]
    block_bytes = bytes_per_block(shape, config.block_size, dtype)
    size = cache_size(config, block_bytes, shape.max_position, available_memory_bytes(device))
    kv_cache = KVCache(
        shape,
        num_blocks=size.num_blocks,
        block_size=config.block_size,
        dtype=dtype,
        device=device,
        layout=kv_layout(config, shape, dtype),
        lend=lend_kv,
    )
    scheduler_config = SchedulerConfig(
        num_blocks=size.num_blocks,
        block_size=config.block_size,
        max_model_len=size.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_prefill_chunk=config.max_prefill_chunk,
    )
    max_blocks = scheduler_config.max_request_blocks
    backend = choose_backend(config, loaded, kv_cache, max_model_len=size.max_model_len, max_blocks=max_blocks)
    runner = ModelRunner(
        backend.executor,
        sampling=backend.sampling,
        batch_device=backend.batch_device,
        device=device,
        block_size=config.block_size,
        vocab_size=shape.vocab_size,
        num_seats=config.max_num_seqs,
        max_blocks=max_blocks,
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
