"""What an engine is told, and how many KV blocks that comes to."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdmesh.config import option
from pdmesh.errors import ConfigError
from pdmesh.host_memory import available_host_bytes

if TYPE_CHECKING:
    # Late, where it is needed: a supervisor of ranks reads this config, and computes nothing.
    import torch

_DEFAULT_CPU_CACHE_BYTES = 1 << 30
# Of the memory that is free once the weights are loaded.
_MAX_CPU_SHARE = 0.5
_MAX_CUDA_SHARE = 0.85


# The place of weights that wait in a file.
DISK = "disk"

# Models of so many bytes of weights are not packed unless somebody asks: that takes seconds, and memory of their own.
_MAPPED_BYTES = 1 << 30

_DEVICE_MAPS = ("auto", "balanced", "sequential")
_MAX_MEMORY = re.compile(r"(cpu|disk|cuda:\d+)=(\d+(?:\.\d+)?)([KMGT]i?B|B)?")
_UNIT_BYTES = {"": 1, "B": 1} | {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", 1)
    for binary in ("", "i")
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises ConfigError for values that make no sense, whatever the model.

    Blocks beyond those of one request of max_model_len are what leases may pin while they wait: a cache that holds no
    more lets decode workers keep no prefix of a prompt that is computed elsewhere, and all of it travels.
    """

    model: str = option("Hugging Face model directory, .gguf file or Hub id", positional=True)
    dtype: str = option(
        "what the model computes in; auto: float32 on CPU, bfloat16 on CUDA",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = option(
        "weights in fewer bits: int8 (8.5 with scales) or int4 (5), of all matrices; activations and KV stay dtype",
        default="none",
        choices=("none", "int8", "int4"),
    )
    weights: str = option(
        "mapped: the CPU kernels read them where they lie in their files, which workers of a host share, if these hold "
        "the dtype; packed: copied into an order that they read faster; auto: mapped from 1 GiB on",
        default="auto",
        choices=("auto", "mapped", "packed"),
    )
    device: str = option("where it computes", default="auto", choices=("auto", "cpu", "cuda"))
    block_size: int = option("tokens in a KV block", default=16)
    kv_cache_dtype: str = option(
        "what keys and values are stored in; auto: as the model computes; int8: with a scale for each token and head",
        default="auto",
        choices=("auto", "int8"),
    )
    kv_cache_bytes: int | None = option(
        "bytes of KV cache; default: 1 GiB and at most half of the free memory, on CUDA most of what is free",
        default=None,
    )
    num_blocks: int | None = option("KV blocks, in place of kv_cache_bytes", default=None)
    max_model_len: int | None = option(
        "most tokens of a request, prompt and output; default: the model's, or as many as the KV cache holds",
        default=None,
    )
    max_num_seqs: int = option("requests in a step at most", default=64)
    max_num_batched_tokens: int = option("tokens in a step at most", default=512)
    max_prefill_chunk: int = option("prompt tokens of one request in a step at most", default=512)
    micro_batches: int = option("parts of a step at most that overlap in the stages of a pipeline (--pp)", default=8)
    num_threads: int | None = option(
        "CPU threads that compute, of each rank; default: the machine's cores, shared", default=None
    )
    kernels: str = option(
        "auto: our own kernels where they serve the model and the device; torch: plain torch",
        default="auto",
        choices=("auto", "torch"),
    )
    device_map: str | None = option(
        "where weights lie: auto or balanced (what does not fit the device waits elsewhere, spread over the layers), "
        "sequential (the last layers do), or a .json file of module names and devices",
        default=None,
    )
    max_memory: str | None = option(
        "most bytes of weights in each place, e.g. cpu=8GiB,cuda:0=20GiB,disk=100GiB; default: most of what is free",
        default=None,
    )
    offload_dir: str | None = option("directory for weights that wait on disk", default=None)
    compile: bool = option(
        "compute with torch, the decoder layers compiled by torch.compile; on a CPU that is in place of our kernels",
        default=False,
    )

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_prefill_chunk", "micro_batches"):
            _check_positive(name, getattr(self, name))
        for name in ("kv_cache_bytes", "num_blocks", "max_model_len", "num_threads"):
            _check_positive(name, getattr(self, name))
        if self.device_map not in (None, *_DEVICE_MAPS) and not self.device_map.endswith(".json"):
            raise ConfigError(f"--device-map is {self.device_map}: must be {', '.join(_DEVICE_MAPS)} or a .json file")
        if self.compile and self.offloads:
            raise ConfigError("--compile works for weights that stay: leave it out, or --device-map and --max-memory")
        _ = self.memory_limits
        if self.kv_cache_bytes is not None and self.num_blocks is not None:
            raise ConfigError("kv_cache_bytes and num_blocks are two ways to say one thing: give one of them")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs is {self.max_num_seqs}, more than max_num_batched_tokens, "
                f"{self.max_num_batched_tokens}: each running request takes at least one token of a step"
            )

    @property
    def torch_device(self) -> "torch.device":
        """Raises ConfigError for cuda where there is none."""
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, and torch finds no CUDA device here: use cpu or auto")
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def offloads(self) -> bool:
        """Whether weights may lie elsewhere than with what computes."""
        return self.device_map is not None or self.max_memory is not None

    def maps_weights(self, num_bytes: int) -> bool:
        """`weights`, decided for a model of so many bytes."""
        return num_bytes >= _MAPPED_BYTES if self.weights == "auto" else self.weights == "mapped"

    @property
    def memory_limits(self) -> dict[str, int]:
        """`max_memory`, in bytes. Raises ConfigError where it is not readable."""
        limits = {}
        for item in self.max_memory.split(",") if self.max_memory else ():
            match = _MAX_MEMORY.fullmatch(item.strip())
            if match is None:
                raise ConfigError(
                    f"--max-memory is {self.max_memory}: must be places and sizes, as cpu=8GiB,cuda:0=20GiB,disk=1TB"
                )
            limits[match[1]] = int(float(match[2]) * _UNIT_BYTES[match[3] or ""])
        return limits

    @property
    def dtype_name(self) -> str:
        """`dtype`, decided."""
        if self.dtype == "auto":
            return "bfloat16" if self.torch_device.type == "cuda" else "float32"
        return self.dtype

    @property
    def kv_dtype_name(self) -> str:
        """`kv_cache_dtype`, decided."""
        return self.dtype_name if self.kv_cache_dtype == "auto" else self.kv_cache_dtype


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How large the KV cache is, and how long that lets a request be."""

    num_blocks: int
    max_model_len: int


def cache_size(config: EngineConfig, block_bytes: int, model_max_len: int, available_bytes: int) -> CacheSize:
    """Decides the size before anything is allocated.

    Args:
        block_bytes: Bytes of one block.
        model_max_len: Tokens that the model was made for.
        available_bytes: Free memory where the cache will lie.

    Raises ConfigError where the cache does not fit in the memory, or the longest request not in the cache.
    """
    max_len = config.max_model_len or model_max_len
    if max_len > model_max_len:
        raise ConfigError(f"max_model_len is {max_len}: the model was made for {model_max_len} tokens at most")
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_cache_bytes is not None:
        num_blocks = config.kv_cache_bytes // block_bytes
    else:
        on_cpu = config.torch_device.type == "cpu"
        share = int(available_bytes * (_MAX_CPU_SHARE if on_cpu else _MAX_CUDA_SHARE))
        num_bytes = min(share, _DEFAULT_CPU_CACHE_BYTES) if on_cpu else share
        # Small models: as much as a full batch of the longest requests needs, and the same again for cached prefixes.
        num_useful = 2 * config.max_num_seqs * -(-max_len // config.block_size)
        num_blocks = min(num_bytes // block_bytes, num_useful)
    if num_blocks < 1:
        raise ConfigError(f"the KV cache has room for no block of {block_bytes} bytes: raise kv_cache_bytes")
    if num_blocks * block_bytes > available_bytes:
        raise ConfigError(
            f"the KV cache would take {_gib(num_blocks * block_bytes)} and {_gib(available_bytes)} are free: "
            "lower num_blocks or kv_cache_bytes"
        )
    capacity = num_blocks * config.block_size
    if config.max_model_len is not None and max_len > capacity:
        raise ConfigError(
            f"max_model_len is {max_len} and the KV cache holds {capacity} tokens: "
            "raise num_blocks or kv_cache_bytes, or lower max_model_len"
        )
    return CacheSize(num_blocks, min(max_len, capacity))


def available_memory_bytes(device: "torch.device", mapped_bytes: int = 0) -> int:
    """Free memory on `device`; for the host, also within this container's limit.

    Args:
        mapped_bytes: Of files that are to stay in the host's memory.
    """
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_host_bytes(mapped_bytes)


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{name} is {value}: must be at least 1")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
