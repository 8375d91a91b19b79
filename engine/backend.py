"""Which way to compute: the kernels for the device where they serve the model, else plain torch."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.cpu.build import BuildError, kernels_path, this_target
from engine.cpu.executor import CpuExecutor, SharedSums, SumsBetween, cpu_layout
from engine.cpu.library import Kernels
from engine.cpu.packed_model import PackedModel, pack_model
from engine.cpu.sampling import CpuSampling
from engine.cuda.support import can_use_kernels
from engine.executor import ModelExecutor, TorchExecutor
from engine.kv_cache import PLAIN, KVCache, KVLayout
from engine.loader import DTYPES, LoadedModel
from engine.model_config import ModelConfig
from engine.parallel.exchange import Exchange
from engine.parallel.host_exchange import HostExchange
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


def cpu_kernels(config: EngineConfig, device: torch.device) -> Path | None:
    """Our kernels for this machine's CPU; None where another way is to be taken, or there is no compiler."""
    if config.kernels != "auto" or config.compile or device.type != "cpu":
        return None
    try:
        return kernels_path(this_target())
    except BuildError as error:
        log.warning("computing in plain torch, several times slower than the CPU kernels: %s", error)
        return None


def packs(config: EngineConfig, model: ModelConfig, kernels: Path | None) -> bool:
    """Whether the CPU kernels (of `cpu_kernels`) compute the model, from packed matrices."""
    return kernels is not None and cpu_layout(model, config.block_size, DTYPES[config.dtype_name]) is not None


def pack_weights(config: EngineConfig, loaded: LoadedModel, kernels: Path | None) -> PackedModel | None:
    """The loaded model's matrices as the CPU kernels read them; None where these do not compute it.

    Raises ConfigError where the checkpoint cannot give one of them.
    """
    if kernels is None or not packs(config, loaded.config, kernels):
        return None
    return pack_model(loaded, Kernels(kernels, DTYPES[config.dtype_name]), num_threads=torch.get_num_threads())


def choose_backend(
    config: EngineConfig,
    loaded: LoadedModel,
    packed: PackedModel | None,
    kv_cache: KVCache,
    *,
    kernels: Path | None,
    exchange: Exchange | None,
    max_model_len: int,
    max_blocks: int,
) -> Backend:
    """Makes the executor.

    Args:
        packed: Of `pack_weights`.
        kernels: Of `cpu_kernels`.
        exchange: With the other ranks of this one's group.
        max_model_len: Tokens of the longest request.
        max_blocks: Blocks of it.
    """
    device, shard = kv_cache.device, loaded.shard
    if kernels is not None:
        return _cpu_backend(kernels, config, loaded, packed, kv_cache, exchange, max_model_len)
    if config.compile:
        # Imports torch's compiler.
        from engine.compiled import compile_layers

        compile_layers(loaded.model, kv_cache)
    elif config.kernels == "auto" and shard.pp_size == 1 and can_use_kernels(loaded.config, device):
        # Imports Triton.
        from engine.cuda.executor import CudaExecutor

        executor = CudaExecutor(
            loaded.model, len(shard.heads), kv_cache, max_num_seqs=config.max_num_seqs, max_blocks=max_blocks
        )
        return Backend(executor, TorchSampling(), torch.device("cpu"))
    plain = TorchExecutor(loaded.model, kv_cache, last_stage=shard.last_stage)
    # What a group's leader sends to the others lies on the host.
    return Backend(plain, TorchSampling(), device if exchange is None else torch.device("cpu"))


def _cpu_backend(
    path: Path,
    config: EngineConfig,
    loaded: LoadedModel,
    packed: PackedModel | None,
    kv_cache: KVCache,
    exchange: Exchange | None,
    max_model_len: int,
) -> Backend:
    num_threads = torch.get_num_threads()
    sampling = CpuSampling(path, vocab_size=loaded.config.vocab_size, num_threads=num_threads)
    if packed is None:
        log.warning(
            "computing in plain torch, several times slower than the CPU kernels: these serve Llama and its relatives "
            "in float32 and bfloat16, with blocks and heads of a multiple of 16"
        )
        executor = TorchExecutor(loaded.model, kv_cache, last_stage=loaded.shard.last_stage)
        return Backend(executor, sampling, kv_cache.device)
    sums: SharedSums | SumsBetween | None = None
    if isinstance(exchange, HostExchange):
        sums = SharedSums(exchange.group, exchange.partial_rows)
    elif exchange is not None:
        sums = exchange.all_reduce
    cpu_executor = CpuExecutor(
        Kernels(path, kv_cache.dtype),
        loaded,
        packed,
        kv_cache,
        max_tokens=config.max_num_batched_tokens,
        max_position=max_model_len,
        num_threads=num_threads,
        sums=sums,
    )
    return Backend(cpu_executor, sampling, kv_cache.device)
