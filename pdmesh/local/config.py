"""What the operator of a local cluster says, checked before anything starts."""

import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from pdmesh.config import option
from pdmesh.errors import ConfigError
from pdmesh.model_source import is_hub_id
from pdmesh.types import Role


@dataclass(frozen=True, slots=True)
class LocalConfig:
    """Settings not named here reach the services as PDMESH_* variables, which they inherit."""

    model: str = option("Hugging Face model directory, .gguf file or Hub id", positional=True)
    prefill: int = option("prefill workers", default=1)
    decode: int = option("decode workers", default=1)
    stores: int = option("stores that keep KV for all workers", default=0)
    prefill_tp: int = option("ranks of a prefill worker that share every layer (tensor parallel)", default=1)
    prefill_pp: int = option("stages that a prefill worker's layers are divided into (pipeline parallel)", default=1)
    decode_tp: int = option("ranks of a decode worker that share every layer", default=1)
    decode_pp: int = option("stages that a decode worker's layers are divided into", default=1)
    host: str = option("address that the router listens on", default="127.0.0.1")
    port: int = option("port that the router listens on; 0 takes a free one", default=50051)
    metrics_port: int = option(
        "HTTP port of the router's /metrics; each worker's is one of the next, in order; 0 serves none", default=0
    )
    redis_url: str | None = option("Redis to use; default: an embedded Valkey of this cluster's own", default=None)
    cluster: str = option("name that keeps clusters on one Redis apart", default="default")
    dtype: str = option(
        "what the model computes in; auto: float32 on CPU, bfloat16 on CUDA",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = option(
        "weights in fewer bits: int8 (8.5 with scales) or int4 (5)", default="none", choices=("none", "int8", "int4")
    )
    weights: str = option(
        "mapped: computed with where they lie in their files; packed: copied; auto: mapped from 1 GiB on",
        default="auto",
        choices=("auto", "mapped", "packed"),
    )
    device: str = option("where the workers compute", default="auto", choices=("auto", "cpu", "cuda"))
    kv_cache_dtype: str = option(
        "what keys and values are stored in; auto: as the model computes; int8: with a scale for each token and head",
        default="auto",
        choices=("auto", "int8"),
    )
    device_map: str | None = option("where each worker's weights lie, as a worker's own --device-map", default=None)
    max_memory: str | None = option("most bytes of each worker's weights in each place, e.g. cpu=8GiB", default=None)
    offload_dir: str | None = option("directory for weights that wait on disk", default=None)
    num_threads: int | None = option(
        "CPU threads of each worker, or of each rank of it; default: the cores, divided", default=None
    )
    kv_cache_bytes: int | None = option("bytes of KV cache of each worker; default: theirs", default=None)
    kv_host_gib: float = option("GiB of host memory of each worker for KV that left its cache; 0: none", default=0.0)
    kv_disk_gib: float = option("GiB of disk of each worker below that; 0: none", default=0.0)
    store_host_gib: float = option("GiB of host memory of each store", default=1.0)
    store_disk_gib: float = option("GiB of disk of each store below that; 0: none", default=0.0)
    kv_disk_dir: str | None = option(
        "directory for KV on disk, in which each worker and store gets one of its own", default=None
    )
    max_model_len: int | None = option("most tokens of a request; default: the model's", default=None)
    transports: str | None = option("transports that KV may take, best first; default: all", default=None)
    short_prefill_tokens: int | None = option(
        "prompts with at most so many tokens to compute stay on the decode worker; default: theirs", default=None
    )
    log_level: str = option("least severe level logged", default="info", choices=("debug", "info", "warning", "error"))
    drain_s: float = option("seconds given to running requests when the cluster stops", default=10.0)
    run_dir: str | None = option("directory for logs; default: a new one among the temporary files", default=None)

    def __post_init__(self) -> None:
        if self.prefill < 0:
            raise ConfigError(f"--prefill is {self.prefill}: must not be negative")
        if self.decode < 1:
            raise ConfigError(f"--decode is {self.decode}: a cluster needs at least one decode worker")
        if self.stores < 0:
            raise ConfigError(f"--stores is {self.stores}: must not be negative")
        for name in ("prefill_tp", "prefill_pp", "decode_tp", "decode_pp"):
            if (degree := getattr(self, name)) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {degree}: must be at least 1")
        if (self.kv_disk_dir is not None) != (self.kv_disk_gib > 0 or (self.stores > 0 and self.store_disk_gib > 0)):
            raise ConfigError(
                "--kv-disk-dir says where, --kv-disk-gib and --store-disk-gib how much each worker and store keeps on "
                "disk: give a size and the directory, or none of them"
            )
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"--num-threads is {self.num_threads}: must be at least 1")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}: must lie in [0, 65535]")
        num_members = self.prefill + self.decode + self.stores
        if not 0 <= self.metrics_port <= 65535 - num_members:
            raise ConfigError(
                f"--metrics-port is {self.metrics_port}: it and {num_members} ports after it, one for each worker and "
                "store, must lie in [0, 65535]"
            )
        if self.drain_s < 0:
            raise ConfigError(f"--drain-s is {self.drain_s}: must not be negative")

    def degrees(self, role: Role) -> tuple[int, int]:
        """Tensor-parallel and pipeline-parallel degree of each member of this role."""
        match role:
            case Role.PREFILL:
                return self.prefill_tp, self.prefill_pp
            case Role.DECODE:
                return self.decode_tp, self.decode_pp
            case Role.STORE:
                return 1, 1

    @property
    def threads_per_rank(self) -> int:
        """Of each process that computes."""
        num_ranks = self.prefill * math.prod(self.degrees(Role.PREFILL)) + self.decode * math.prod(
            self.degrees(Role.DECODE)
        )
        return self.num_threads or max(1, num_cores() // num_ranks)

    def check_model(self) -> None:
        """Raises ConfigError where the model can be neither a path nor a Hub id."""
        if Path(self.model).expanduser().exists() or is_hub_id(self.model):
            return
        raise ConfigError(
            f"{self.model}: no such file or directory: name a Hugging Face model directory, a .gguf file or a Hub id "
            "such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )

    def free_port(self) -> int:
        """The port for the router, found free now. Raises ConfigError where it is taken."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As gRPC binds: a port whose last connections linger is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise ConfigError(
                    f"cannot listen on {self.host}:{self.port} ({error.strerror}): "
                    f"choose another port, such as --port {self.port + 1}, or --port 0 for a free one"
                ) from error
            return int(probe.getsockname()[1])


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
