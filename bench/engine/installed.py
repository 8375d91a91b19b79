"""Which engines are here, and how each is started: its Python, its adapter, its environment."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pdmesh.errors import ConfigError

PEERS = ("transformers", "vllm", "llamacpp")


@dataclass(frozen=True, slots=True)
class Installed:
    """One engine that can be started.

    Attributes:
        python: The interpreter that has it.
        module: Its adapter.
        environment: Variables beside ours; they must be there when the process starts.
        takes_gguf: It loads the GGUF file, the others the Hugging Face directory.
    """

    name: str
    python: Path
    module: str
    environment: dict[str, str]
    takes_gguf: bool = False


def ours(threads: int) -> Installed:
    return Installed("ours", Path(sys.executable), "bench.engine.ours", _threads(threads))


def find_peer(name: str, *, device: str, threads: int) -> Installed:
    """Raises ConfigError, which says how to install it, where it is not installed."""
    if name not in PEERS:
        raise ConfigError(f"there is no peer {name}: known are {', '.join(PEERS)}")
    module = f"bench.engine.peers.{name}"
    if device != "cpu":
        # The peers' environments are made for CPUs. This one has transformers, and the torch that fits the device.
        if name != "transformers":
            raise ConfigError(f"{name} is left out: it is measured on CPUs only")
        return Installed(name, Path(sys.executable), module, {"HF_HUB_OFFLINE": "1"})
    home = peers_home() / name
    # Made last by the installer: without it the environment is half there.
    if not (home / ".installed").exists():
        raise ConfigError(f"{name} is left out: `bench/engine/install_peers.sh {name}` installs it")
    environment = {"HF_HUB_OFFLINE": "1", **_threads(threads)}
    if name == "vllm":
        environment |= _vllm_on_cpu(home, threads)
    return Installed(name, home / "bin" / "python", module, environment, takes_gguf=name == "llamacpp")


def peers_home() -> Path:
    return Path(os.environ.get("PDMESH_PEERS") or Path.home() / ".cache" / "pdmesh" / "peers")


def _threads(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads)}


def _vllm_on_cpu(home: Path, threads: int) -> dict[str, str]:
    """What its documentation advises for speed, and its engine in the process that calls it, which is faster here."""
    libraries = [*home.glob("tcmalloc/**/libtcmalloc_minimal.so.4"), *home.glob("lib/libiomp5.so")]
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "LD_PRELOAD": ":".join(str(library) for library in libraries),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in cores),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
