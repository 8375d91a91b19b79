"""Whence KV can come, the cluster that each way takes, and what proves that it came from there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tiers.counters import Counts

BLOCK_TOKENS = 16
PREFIX_TOKENS = 1024
PREFIX_BLOCKS = PREFIX_TOKENS // BLOCK_TOKENS
# A question of its own after each prefix.
TAIL_TOKENS = BLOCK_TOKENS
# SmolLM2-135M: 30 layers, K and V, 3 heads of 64; times the bytes of an element.
_BLOCK_ELEMENTS = BLOCK_TOKENS * 30 * 2 * 3 * 64
_ITEM_BYTES = {"bfloat16": 2, "float32": 4}
# The longest request, and two of them: the third evicts the first.
_MAX_MODEL_LEN = PREFIX_TOKENS + TAIL_TOKENS + 3 * BLOCK_TOKENS
_POOL_BLOCKS = 2 * _MAX_MODEL_LEN // BLOCK_TOKENS
_GIB = 1 << 30


def block_bytes(dtype: str) -> int:
    return _BLOCK_ELEMENTS * _ITEM_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class Asked:
    """A prefix asked for again.

    Attributes:
        given: What each process gave meanwhile, by name.
        cached_tokens: Of the prompt, by the answer.
        first_worker, second_worker: Where the prefix was computed, and where the prompt was prefilled this time.
    """

    given: Mapping[str, Counts]
    cached_tokens: int
    first_worker: str
    second_worker: str


@dataclass(frozen=True, slots=True)
class Way:
    """One place for KV to come from.

    Attributes:
        title: For a person.
        wanted: At most this share of the time that computing takes.
        cluster: Fields of LocalConfig, of the bytes of a block and a directory for KV on disk.
        proves: Whether all of the prefix came from there and nowhere else, given the bytes of a block.
    """

    title: str
    wanted: float
    cluster: Callable[[int, Path], dict[str, Any]]
    proves: Callable[[Asked, int], bool]


def _small_pools(num_bytes: int) -> dict[str, Any]:
    return {"max_model_len": _MAX_MODEL_LEN, "kv_cache_bytes": _POOL_BLOCKS * num_bytes}


def _host_cluster(num_bytes: int, directory: Path) -> dict[str, Any]:
    return {**_small_pools(num_bytes), "kv_host_gib": 2.0}


def _disk_cluster(num_bytes: int, directory: Path) -> dict[str, Any]:
    # Host memory holds one prompt: those before it are on disk alone.
    host_gib = (PREFIX_BLOCKS + 8) * num_bytes / _GIB
    return {**_small_pools(num_bytes), "kv_host_gib": host_gib, "kv_disk_gib": 4.0, "kv_disk_dir": str(directory)}


def _store_cluster(num_bytes: int, directory: Path) -> dict[str, Any]:
    return {**_small_pools(num_bytes), "prefill": 2, "stores": 1, "store_host_gib": 2.0}


def _from_host(asked: Asked, num_bytes: int) -> bool:
    return _is_whole(asked) and _hits(asked) == (PREFIX_BLOCKS, 0)


def _from_disk(asked: Asked, num_bytes: int) -> bool:
    read = sum(counts.device_bytes for counts in asked.given.values())
    return _is_whole(asked) and _hits(asked) == (0, PREFIX_BLOCKS) and read >= PREFIX_BLOCKS * num_bytes


def _from_store(asked: Asked, num_bytes: int) -> bool:
    """The store read all of it and sent all of it, to a worker that had not computed it."""
    stores = [given for name, given in asked.given.items() if name.startswith("store-")]
    sent = sum(given.sent_bytes for given in stores)
    took = asked.given.get(asked.second_worker, Counts())
    return (
        _is_whole(asked)
        and _hits(asked) == (PREFIX_BLOCKS, 0)
        and asked.second_worker != asked.first_worker
        # Beside it only the question's own block travels, to the store.
        and sent == PREFIX_BLOCKS * num_bytes
        and took.received_bytes == sent
    )


def _is_whole(asked: Asked) -> bool:
    return asked.cached_tokens == PREFIX_TOKENS


def _hits(asked: Asked) -> tuple[int, int]:
    """Blocks that came from host memory and from disk, over all processes."""
    given = asked.given.values()
    return sum(counts.host_hits for counts in given), sum(counts.disk_hits for counts in given)


WAYS = {
    "host": Way("host memory", 0.3, _host_cluster, _from_host),
    "disk": Way("disk", 0.5, _disk_cluster, _from_disk),
    "store": Way("store, to a second worker", 0.4, _store_cluster, _from_store),
}
