"""The KV cache that a model leaves room for, by the engine's own rule, and what would make it fit where it does not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from engine.backend import Choice, choose_way, kv_dtype, kv_layout
from engine.config import CacheSize, EngineConfig, available_memory_bytes, cache_size
from engine.cpu.build import BuildError, check_kernels
from engine.footprint.ranks import RankMemory, loaded_bytes, placement_of, rank_memory
from engine.kv_cache import KVLayout, bytes_per_block
from engine.loader import DTYPES
from engine.model_config import ModelConfig
from engine.parallel.group import kv_share
from engine.parallel.shard import Shard, possible_tp, shard_of
from engine.placement import DeviceMapError, Placement
from engine.weights.quantized import FORMATS
from pdmesh.errors import ConfigError
from pdmesh.ranks.config import GroupConfig


@dataclass(frozen=True, slots=True)
class Room:
    """A memory that ranks of this machine share.

    Attributes:
        name: "host", or torch's name of a GPU.
        free_bytes: Now, as the engine counts it.
    """

    name: str
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A rank of this machine.

    Attributes:
        room: Where its weights, buffers and part of the KV cache lie.
        placement: Which of its weights wait elsewhere.
        resident_share: How much of them is in its room.
        block_bytes: Of a KV block, what lies in its part.
    """

    rank: int
    shard: Shard
    room: Room
    memory: RankMemory
    placement: Placement
    resident_share: float
    block_bytes: int

    @property
    def resident_bytes(self) -> int:
        """Of weights, in its room."""
        return int(self.resident_share * self.memory.weights.total)


@dataclass(frozen=True, slots=True)
class Fit:
    """What a config comes to.

    Attributes:
        choice: What computes.
        block_bytes: Of a whole KV block, over all ranks.
        ranks: Of this machine. Where there is no `size`, their buffers are those of the model's longest request.
        size: The KV cache that the engine would make; None where it does not fit, for `problem`.
    """

    config: EngineConfig
    group: GroupConfig
    choice: Choice
    layout: KVLayout
    block_bytes: int
    ranks: tuple[Placed, ...]
    size: CacheSize | None
    problem: str = ""

    @property
    def rooms(self) -> tuple[Room, ...]:
        return tuple(dict.fromkeys(placed.room for placed in self.ranks))

    def kv_bytes(self, room: Room) -> int:
        """Of the KV cache, what lies there."""
        num_blocks = self.size.num_blocks if self.size else 0
        return num_blocks * sum(placed.block_bytes for placed in self.ranks if placed.room == room)

    def needed_bytes(self, room: Room) -> int:
        """Of weights, buffers and KV cache, of all ranks there."""
        there = [placed for placed in self.ranks if placed.room == room]
        return sum(placed.resident_bytes + placed.memory.buffers_bytes for placed in there) + self.kv_bytes(room)


def find_fit(config: EngineConfig, group: GroupConfig, model: ModelConfig) -> Fit:
    """Sees how this machine's ranks of a model would fit in it. Raises ConfigError for a split that is not possible."""
    device, dtype = config.torch_device, DTYPES[config.dtype_name]
    layout = kv_layout(config, model, dtype)
    has_kernels = _has_cpu_kernels(config, device)
    choice = choose_way(config, model, layout, device, has_cpu_kernels=has_kernels, pp_size=group.pp)
    block_bytes = bytes_per_block(model, config.block_size, kv_dtype(config, dtype))
    shards = [shard_of(model, tp=group.tp, pp=group.pp, rank=rank) for rank in group.local_ranks]
    rooms = _rooms(device, group)
    whole = [loaded_bytes(config, model, shard) for shard in shards]
    loaded = whole
    placements = [Placement()] * len(shards)
    size, problem = None, ""
    try:
        placements = [placement_of(config, model, shard, choice.way, device) for shard in shards]
        loaded = [num_bytes - _moved(placement) for num_bytes, placement in zip(whole, placements, strict=True)]
        sizes = [
            _cache_size(config, group, model, shard, block_bytes, room, _in_room(room, rooms, loaded))
            for shard, room in zip(shards, rooms, strict=True)
        ]
        size = CacheSize(min(each.num_blocks for each in sizes), min(each.max_model_len for each in sizes))
    except DeviceMapError:
        raise
    except ConfigError as error:
        problem = error.message
    max_model_len = size.max_model_len if size else model.max_position
    ranks = tuple(
        Placed(
            rank,
            shard,
            room,
            rank_memory(config, model, shard, choice.way, max_model_len),
            placement,
            loaded[index] / whole[index],
            block_bytes * len(shard.kv_heads) * len(shard.layers) // (model.num_kv_heads * model.num_layers),
        )
        for index, (rank, shard, room, placement) in enumerate(
            zip(group.local_ranks, shards, rooms, placements, strict=True)
        )
    )
    fit = Fit(config, group, choice, layout, block_bytes, ranks, size, problem)
    for room in fit.rooms:
        if size is not None and fit.needed_bytes(room) > room.free_bytes:
            needs = f"weights, buffers and KV cache take {_gb(fit.needed_bytes(room))}"
            return replace(fit, size=None, problem=f"{needs} and {_gb(room.free_bytes)} are free on {room.name}")
    return fit


def _moved(placement: Placement) -> int:
    """How much less of the weights is in memory than there is of them."""
    return sum(placement.waiting_bytes.values()) - placement.staged_bytes


def _in_room(room: Room, rooms: Sequence[Room], loaded: Sequence[int]) -> int:
    return sum(num_bytes for other, num_bytes in zip(rooms, loaded, strict=True) if other == room)


def _cache_size(
    config: EngineConfig,
    group: GroupConfig,
    model: ModelConfig,
    shard: Shard,
    block_bytes: int,
    room: Room,
    loaded_there: int,
) -> CacheSize:
    """As the rank itself will come to it, once the weights of all ranks beside it are loaded. Raises ConfigError."""
    if loaded_there > room.free_bytes:
        raise ConfigError(f"the weights take {_gb(loaded_there)} and {_gb(room.free_bytes)} are free on {room.name}")
    share = kv_share(model, shard, config.torch_device, group)
    available_bytes = int((room.free_bytes - loaded_there) / share)
    return cache_size(config, block_bytes, model.max_position, available_bytes)


def remedies(fit: Fit, model: ModelConfig) -> list[str]:
    """What to do where it does not fit: options with what they would come to, the least change first."""
    found = []
    for config, words in _other_configs(fit, model):
        other = find_fit(config, fit.group, model)
        if other.size is not None:
            found.append(f"{words}: {_gb(_needed_bytes(other))} in all, requests of up to {_longest(other):,} tokens")
    for group, words in _other_groups(fit, model):
        other = find_fit(fit.config, group, model)
        if other.size is not None:
            found.append(f"{words}: {_gb(_needed_bytes(other) // len(other.ranks))} in each rank")
            break
    return found


def _other_configs(fit: Fit, model: ModelConfig) -> Iterator[tuple[EngineConfig, str]]:
    config = fit.config
    if config.num_blocks is not None or config.kv_cache_bytes is not None:
        yield replace(config, num_blocks=None, kv_cache_bytes=None), "leave the size of the KV cache to the engine"
    if config.max_model_len is not None:
        wanted = -(-config.max_model_len // config.block_size) * fit.block_bytes
        yield (
            replace(config, num_blocks=None, kv_cache_bytes=wanted),
            f"--kv-cache-bytes {wanted}, as --max-model-len {config.max_model_len} takes",
        )
        yield replace(config, max_model_len=None), "leave --max-model-len out"
    if config.kv_cache_dtype != "int8":
        yield replace(config, kv_cache_dtype="int8"), "--kv-cache-dtype int8"
    if config.quantization == "none":
        for quantization in FORMATS:
            yield replace(config, quantization=quantization), f"--quantization {quantization}"
    for dtype, torch_dtype in DTYPES.items():
        if torch_dtype.itemsize < DTYPES[config.dtype_name].itemsize:
            yield replace(config, dtype=dtype), f"--dtype {dtype}"


def _other_groups(fit: Fit, model: ModelConfig) -> Iterator[tuple[GroupConfig, str]]:
    """More ranks: of this machine where each has a GPU of its own, else of several machines like this one."""
    if fit.group.nnodes > 1:
        return
    on_gpus = fit.config.torch_device.type == "cuda"
    for tp in possible_tp(model):
        if tp <= fit.group.tp:
            continue
        if on_gpus and tp * fit.group.pp <= torch.cuda.device_count():
            yield replace(fit.group, tp=tp), f"--tp {tp}"
        elif not on_gpus:
            spread = replace(fit.group, tp=tp, nnodes=tp, rendezvous="node-0:29400")
            if spread.size % tp == 0:
                yield spread, f"--tp {tp} --nnodes {tp}, {tp} machines like this one"


def _rooms(device: torch.device, group: GroupConfig) -> Sequence[Room]:
    """Of each rank of this machine."""
    if device.type == "cpu":
        return [Room("host", available_memory_bytes(device))] * group.local_size
    if (num_devices := torch.cuda.device_count()) < group.local_size:
        raise ConfigError(
            f"{group.local_size} ranks of this machine need a GPU each, and there are {num_devices}: lower --tp or "
            "--pp, or spread the ranks with --nnodes"
        )
    devices = [torch.device("cuda", index) for index in range(group.local_size)]
    return [Room(str(device), available_memory_bytes(device)) for device in devices]


def _has_cpu_kernels(config: EngineConfig, device: torch.device) -> bool:
    if config.kernels != "auto" or config.compile or device.type != "cpu":
        return False
    try:
        check_kernels()
    except BuildError:
        return False
    return True


def _needed_bytes(fit: Fit) -> int:
    return sum(map(fit.needed_bytes, fit.rooms))


def _longest(fit: Fit) -> int:
    return fit.size.max_model_len if fit.size else 0


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
