"""Which way to compute: the kernels for the device where they serve the model, else plain torch."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.cpu.build import BuildError, kernels_path, this_target
from engine.cpu.executor import CpuExecutor, cpu_layout
from engine.cpu.library import Kernels
from engine.cpu.sampling import CpuSampling
from engine.cuda.support import can_use_kernels
from engine.executor import ModelExecutor, TorchExecutor
from engine.kv_cache import PLAIN, KVCache, KVLayout
from engine.loader import LoadedModel
from engine.model_config import ModelConfig
from engine.sampling_ops import SamplingOps
from engine.torch_sampling import TorchSampling

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """What the runner computes with.

    Attributes:
        batch_device: Where the executor takes batches.
    """

    executor: ModelExecutor
    sampling: SamplingOps
    batch_device: torch.device


def kv_layout(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> KVLayout:
    """The layout of the KV cache. On a CPU it is the kernels', also where plain torch computes: workers with and
    without them exchange blocks as they lie."""
    layout = cpu_layout(model, config.block_size, dtype) if config.torch_device.type == "cpu" else None
    return layout or PLAIN


def choose_backend(
    config: EngineConfig, loaded: LoadedModel, kv_cache: KVCache, *, max_model_len: int, max_blocks: int
) -> Backend:
    """Makes the executor, which may take the model's weights and seconds.

    Args:
        max_model_len: Tokens of the longest request.
        max_blocks: Blocks of it.
    """
    device = kv_cache.device
    if config.compile:
        # Imports torch's compiler.
        from engine.compiled import compile_layers

        compile_layers(loaded.model, kv_cache)
    elif config.kernels == "auto" and device.type == "cpu" and (path := _cpu_kernels()):
        return _cpu_backend(path, config, loaded, kv_cache, max_model_len)
    if config.kernels == "auto" and can_use_kernels(loaded.config, device):
        # Imports Triton.
        from engine.cuda.executor import CudaExecutor

        executor = CudaExecutor(
            loaded.model, loaded.config, kv_cache, max_num_seqs=config.max_num_seqs, max_blocks=max_blocks
        )
        return Backend(executor, TorchSampling(), torch.device("cpu"))
    return Backend(TorchExecutor(loaded.model, kv_cache), TorchSampling(), device)


def _cpu_backend(
    path: Path, config: EngineConfig, loaded: LoadedModel, kv_cache: KVCache, max_model_len: int
) -> Backend:
    num_threads = torch.get_num_threads()
    sampling = CpuSampling(path, vocab_size=loaded.config.vocab_size, num_threads=num_threads)
    if kv_cache.layout == PLAIN:
        log.warning(
            "computing in plain torch, several times slower than the CPU kernels: these serve Llama in float32 and "
            "bfloat16, with blocks and heads of a multiple of 16"
        )
        return Backend(TorchExecutor(loaded.model, kv_cache), sampling, kv_cache.device)
    executor = CpuExecutor(
        Kernels(path, kv_cache.dtype),
        loaded.model,
        loaded.config,
        kv_cache,
        max_tokens=config.max_num_batched_tokens,
        max_position=max_model_len,
        num_threads=num_threads,
    )
    return Backend(executor, sampling, kv_cache.device)


def _cpu_kernels() -> Path | None:
    try:
        return kernels_path(this_target())
    except BuildError as error:
        log.warning("computing in plain torch, several times slower than the CPU kernels: %s", error)
        return None
