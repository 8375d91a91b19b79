"""Which way to compute: the kernels for the device where they serve the model, else plain torch."""

import logging
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.cpu.build import BuildError, kernels_path, this_target
from engine.cpu.executor import CpuExecutor, SharedSums, SumsBetween, cpu_layout
from engine.cpu.library import Kernels, QuantizeKernels
from engine.cpu.packed_model import PackedModel, pack_model
from engine.cpu.packing import Packer
from engine.cpu.sampling import CpuSampling
from engine.cuda.support import no_kernels_because
from engine.executor import ModelExecutor, TorchExecutor
from engine.kv_cache import PLAIN, KVCache, KVLayout
from engine.layers_ahead import fill_waiting
from engine.loader import DTYPES, LoadedModel
from engine.model_config import ModelConfig
from engine.models.decoder import DecoderForCausalLM
from engine.parallel.exchange import Exchange
from engine.parallel.host_exchange import HostExchange
from engine.placement import place_weights
from engine.sampling_ops import SamplingOps
from engine.torch_sampling import TorchSampling
from engine.weights.offload_file import FileMemory, OffloadFile
from engine.weights.quantized import FORMATS, UNQUANTIZED, Quantization, Quantizer

log = logging.getLogger(__name__)

_NOT_FOR_CPU_KERNELS = (
    "these serve float32 and bfloat16, blocks and heads of a multiple of 16, and mixtures of experts without biases"
)
_INT8_KV = "the CUDA kernels read no KV cache in int8"


class Way(Enum):
    """What computes a model."""

    CPU_KERNELS = "CPU kernels"
    CUDA_KERNELS = "CUDA kernels"
    COMPILED = "torch, layers compiled"
    TORCH = "plain torch"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which way, and why not a faster one; empty where there is none, or somebody asked for it."""

    way: Way
    because: str = ""


def choose_way(
    config: EngineConfig,
    model: ModelConfig,
    layout: KVLayout,
    device: torch.device,
    *,
    has_cpu_kernels: bool,
    pp_size: int = 1,
) -> Choice:
    """Decides what `choose_backend` makes.

    Args:
        layout: Of `kv_layout`.
        has_cpu_kernels: They are wanted, and this machine has them.
    """
    if has_cpu_kernels:
        return Choice(Way.TORCH, _NOT_FOR_CPU_KERNELS) if layout == PLAIN else Choice(Way.CPU_KERNELS)
    if config.compile:
        return Choice(Way.COMPILED)
    if config.offloads and device.type == "cuda":
        return Choice(Way.TORCH, "weights may lie elsewhere (--device-map, --max-memory)")
    if config.kernels == "auto" and pp_size == 1 and device.type == "cuda":
        because = _INT8_KV if config.kv_cache_dtype == "int8" else no_kernels_because(model, device)
        return Choice(Way.TORCH, because) if because else Choice(Way.CUDA_KERNELS)
    return Choice(Way.TORCH)


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
    if config.torch_device.type != "cpu":
        return PLAIN
    return cpu_layout(model, config.block_size, dtype, kv_dtype(config, dtype)) or PLAIN


def kv_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """What the KV cache of a model that computes in `dtype` stores."""
    return torch.int8 if config.kv_cache_dtype == "int8" else dtype


def cpu_kernels(config: EngineConfig, device: torch.device) -> Path | None:
    """Our kernels for this machine's CPU; None where another way is to be taken, or there is no compiler."""
    if config.kernels != "auto" or config.compile or device.type != "cpu":
        return None
    try:
        return kernels_path(this_target())
    except BuildError as error:
        log.warning("computing in plain torch, several times slower than the CPU kernels: %s", error)
        return None


def weight_quantization(config: EngineConfig) -> Quantization:
    """Quantised by the kernels wherever there are any, also for what computes without them."""
    if config.quantization == "none":
        return UNQUANTIZED
    quantizer: Quantizer | None = None
    try:
        quantizer = QuantizeKernels(kernels_path(this_target()))
    except BuildError as error:
        log.warning("quantising in plain torch, many times slower than the CPU kernels: %s", error)
    return Quantization(FORMATS[config.quantization], quantizer)


def packs(config: EngineConfig, model: ModelConfig, kernels: Path | None) -> bool:
    """Whether the CPU kernels (of `cpu_kernels`) compute the model, from packed matrices."""
    return kernels is not None and cpu_layout(model, config.block_size, DTYPES[config.dtype_name]) is not None


def place_model(
    config: EngineConfig, loaded: LoadedModel, kernels: Path | None, device: torch.device, quantization: Quantization
) -> PackedModel | None:
    """Reads what is still stored into its place: the model's matrices as the CPU kernels read them, which the model
    loses, or its parameters where these do not compute it.

    Raises ConfigError where the checkpoint cannot give them, or they do not fit.
    """
    on_kernels = packs(config, loaded.config, kernels)
    if not on_kernels and not config.offloads:
        return None
    placement = place_weights(loaded.model, config, device, loaded.dtype, quantization.format, output_waits=on_kernels)
    offload_dir = None if config.offload_dir is None else Path(config.offload_dir)
    if not on_kernels:
        fill_waiting(loaded, placement, offload_dir, device)
        return None
    assert kernels is not None
    assert isinstance(loaded.model, DecoderForCausalLM)
    waiting = {}
    if offload_dir is not None and placement.waiting:
        file = OffloadFile(offload_dir, sum(placement.waiting_bytes.values()))
        waiting = {name: FileMemory(file) for name in placement.waiting}
    maps = config.maps_weights(loaded.model_bytes)
    packer = Packer(Kernels(kernels, loaded.dtype), loaded.stored, torch.get_num_threads(), quantization, maps=maps)
    packed = pack_model(loaded.model, loaded.config, packer, waiting)
    loaded.fill(device)
    return packed


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
        packed: Of `place_model`.
        kernels: Of `cpu_kernels`.
        exchange: With the other ranks of this one's group.
        max_model_len: Tokens of the longest request.
        max_blocks: Blocks of it.
    """
    device, shard = kv_cache.device, loaded.shard
    choice = choose_way(
        config, loaded.config, kv_cache.layout, device, has_cpu_kernels=kernels is not None, pp_size=shard.pp_size
    )
    if choice.because:
        log.warning("computing in plain torch, several times slower than our kernels: %s", choice.because)
    if kernels is not None:
        return _cpu_backend(kernels, config, loaded, packed, kv_cache, exchange, max_model_len)
    if choice.way is Way.COMPILED:
        # Imports torch's compiler.
        from engine.compiled import compile_layers

        compile_layers(loaded.model, kv_cache)
    elif choice.way is Way.CUDA_KERNELS:
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
