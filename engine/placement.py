"""Where the weights of a model lie: with what computes, or elsewhere, from where they come in ahead of need.

Layers wait whole, and so does the output matrix; all else is small, or is looked up at random, and stays.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from engine.config import DISK, EngineConfig, available_memory_bytes
from engine.loader import weights_size
from engine.models.decoder_layer import DecoderLayer
from engine.weights.quantized import WeightFormat
from pdmesh.errors import ConfigError
from pdmesh.host_memory import available_host_bytes

# Layers that are in memory at once where some wait elsewhere: the one that computes, and those that come next.
AHEAD = 2
# Of the memory that is free, what weights may take where nobody says so: the KV cache wants some, too.
_FREE_SHARE = 0.9


class DeviceMapError(ConfigError):
    """A map that a person must mend, however much memory there is."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Of a model on a device.

    Attributes:
        waiting: The modules whose weights lie elsewhere, and where: "cpu", "disk" or another GPU.
        waiting_bytes: How many of them lie in each place.
        staged_bytes: Of those that have come in, on the device, at once.
    """

    waiting: Mapping[str, str] = field(default_factory=dict)
    waiting_bytes: Mapping[str, int] = field(default_factory=dict)
    staged_bytes: int = 0


def place_weights(
    model: nn.Module,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    weight_format: WeightFormat | None,
    *,
    output_waits: bool,
) -> Placement:
    """Decides where the weights of a model without memory will lie, by `--device-map` and `--max-memory`.

    Args:
        weight_format: Of matrices that are quantised; these do not wait elsewhere.
        output_waits: The output matrix may wait as layers do. Then what comes in takes the memory that it needs; else
            there are buffers, each for the largest layer that waits.

    Raises:
        DeviceMapError: where a file of `--device-map` cannot be followed.
        ConfigError: where they do not fit, with what would.
    """
    total_bytes = weights_size(model, dtype, weight_format)
    movable = {
        name: weights_size(module, dtype, weight_format)
        for name, module in model.named_modules()
        if isinstance(module, DecoderLayer) or (output_waits and name == "lm_head")
    }
    limits = _limits(config, device)
    own = device.type if device.type == "cpu" else str(torch.device(device.type, device.index or 0))
    if config.device_map is not None and config.device_map.endswith(".json"):
        waiting = _read_map(Path(config.device_map), model, movable, limits, own)
    elif total_bytes <= limits[own]:
        waiting = {}
    else:
        waiting = _inferred(model, config, dtype, movable, limits, own)
    if waiting and weight_format is not None:
        raise ConfigError(
            f"weights in {weight_format.name} take {_gib(total_bytes)} on {own} and do not wait elsewhere: free so "
            "much there and raise --max-memory, or use --quantization none"
        )
    bytes_in = {place: sum(movable[name] for name in waiting if waiting[name] == place) for place in limits}
    units = [num_bytes for name, num_bytes in movable.items() if name in waiting]
    staged = _most_at_once(units) if output_waits else (AHEAD + 1) * max(units, default=0)
    bytes_in[own] = total_bytes - sum(movable[name] for name in waiting) + staged
    for place, num_bytes in bytes_in.items():
        if num_bytes > limits[place]:
            raise ConfigError(
                f"weights would take {_gib(num_bytes)} on {place} and may take {_gib(limits[place])} there: raise "
                f"--max-memory, or have more of them wait elsewhere (--device-map); in all they are "
                f"{_gib(total_bytes)}, and of layers that come in, {AHEAD + 1} are there at once"
            )
    if bytes_in.get(DISK) and config.offload_dir is None:
        raise ConfigError(
            f"weights of {_gib(bytes_in[DISK])} are to wait on disk: name a directory with --offload-dir, or raise "
            "--max-memory"
        )
    elsewhere = {place: bytes_in[place] for place in limits if place != own and bytes_in[place]}
    return Placement(waiting, elsewhere, staged)


def _most_at_once(units: list[int]) -> int:
    """Of units of so many bytes that come in in turn, and then anew: as many as are there at once."""
    if len(units) <= AHEAD + 1:
        return sum(units)
    return max(sum((units + units)[first : first + AHEAD + 1]) for first in range(len(units)))


def _limits(config: EngineConfig, device: torch.device) -> dict[str, int]:
    """Bytes of weights that each place may hold, the device's first."""
    free = {"cpu": int(available_host_bytes() * _FREE_SHARE), DISK: 1 << 62}
    if device.type == "cuda":
        gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        gpus.sort(key=lambda gpu: gpu.index != (device.index or 0))
        free = {str(gpu): int(available_memory_bytes(gpu) * _FREE_SHARE) for gpu in gpus} | free
    unknown = config.memory_limits.keys() - free.keys()
    if unknown:
        raise ConfigError(f"--max-memory names {min(unknown)}: here are {', '.join(free)}")
    return free | config.memory_limits


def _read_map(
    path: Path, model: nn.Module, movable: Mapping[str, int], limits: Mapping[str, int], own: str
) -> dict[str, str]:
    """As a file says: module names, each with all that is under it ("" is everything), and a device."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DeviceMapError(f"{path}: not readable as JSON ({error}): name modules and devices in it") from error
    modules = {name for name, _ in model.named_modules()}
    can_wait = "whole layers, and lm_head," if "lm_head" in movable else "whole layers"
    if not isinstance(content, dict) or not all(isinstance(place, str) for place in content.values()):
        raise DeviceMapError(f'{path}: must map module names to devices, such as {{"model.layers.0": "disk"}}')
    for name, place in content.items():
        if name not in modules:
            raise DeviceMapError(f"{path}: {name!r} is no module: they are named as {', '.join(list(movable)[:2])}")
        if place not in limits:
            raise DeviceMapError(f"{path}: {name!r} is to lie on {place!r}: here are {', '.join(limits)}")
        if place != own and not any(unit == name or unit.startswith(f"{name}." if name else "") for unit in movable):
            raise DeviceMapError(f"{path}: {name!r} cannot wait on {place}: {can_wait} can; leave it on {own}")
    waiting = {}
    for unit in movable:
        covering = [name for name in content if not name or unit == name or unit.startswith(f"{name}.")]
        place = content[max(covering, key=len)] if covering else own
        if place != own:
            waiting[unit] = place
    return waiting


def _inferred(
    model: nn.Module,
    config: EngineConfig,
    dtype: torch.dtype,
    movable: Mapping[str, int],
    limits: Mapping[str, int],
    own: str,
) -> dict[str, str]:
    """As Accelerate fills the places; `auto` and `balanced` then spread what waits evenly among the layers, so that it
    comes in while others compute."""
    # Takes a second, and brings much along.
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    kinds = ["DecoderLayer"]
    # Accelerate leaves room for one layer that comes in.
    of_device = max(limits[own] - AHEAD * max(movable.values()), 1)
    most = {_accelerate_name(place): limits[place] for place in limits} | {_accelerate_name(own): of_device}
    balanced = config.device_map != "sequential"
    if balanced and len(limits) > 3:
        most = get_balanced_memory(model, max_memory=most, no_split_module_classes=kinds, dtype=dtype)
    inferred = infer_auto_device_map(model, max_memory=most, no_split_module_classes=kinds, dtype=dtype)
    waiting = {}
    for unit in movable:
        (place,) = {place for name, place in inferred.items() if not name or f"{unit}.".startswith(f"{name}.")} or {own}
        if _our_name(place) != own:
            waiting[unit] = _our_name(place)
    return _spread(waiting, [unit for unit in movable if unit != "lm_head"]) if balanced else waiting


def _spread(waiting: Mapping[str, str], layers: list[str]) -> dict[str, str]:
    """The same places for as many layers, as far from each other as can be."""
    places = [waiting[layer] for layer in layers if layer in waiting]
    spread = {layers[len(layers) * (2 * index + 1) // (2 * len(places))]: place for index, place in enumerate(places)}
    return spread | {unit: place for unit, place in waiting.items() if unit not in layers}


def _accelerate_name(place: str) -> int | str:
    return int(place.removeprefix("cuda:")) if place.startswith("cuda:") else place


def _our_name(place: int | str) -> str:
    return f"cuda:{place}" if isinstance(place, int) else place


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
