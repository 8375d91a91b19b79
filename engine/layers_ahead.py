"""Layers of plain torch whose weights wait elsewhere: they come to the device while the layers before compute."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engine.config import DISK
from engine.loader import LoadedModel
from engine.placement import AHEAD, Placement
from engine.weights.offload_file import FileMemory, OffloadFile
from engine.weights.pages import release_pages

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A parameter of a layer: where it belongs, and its values where they wait."""

    owner: nn.Module
    leaf: str
    values: torch.Tensor
    on_disk: bool


def fill_waiting(loaded: LoadedModel, placement: Placement, offload_dir: Path | None, device: torch.device) -> None:
    """Reads a model that is still stored into its places, and has its layers fetch what waits.

    Raises ConfigError where the checkpoint cannot give it, or the disk not take it.
    """
    on_disk = placement.waiting_bytes.get(DISK, 0)
    file = OffloadFile(offload_dir, on_disk) if offload_dir is not None and on_disk else None
    layers = []
    for name, place in placement.waiting.items():
        layer = loaded.model.get_submodule(name)
        layers.append((layer, _wait(loaded, layer, place, file, device)))
    loaded.fill(device)
    if layers:
        _LayersAhead(layers, device)


def _wait(
    loaded: LoadedModel, layer: nn.Module, place: str, file: OffloadFile | None, device: torch.device
) -> list[_Waiting]:
    waiting = []
    memory = None if file is None or place != DISK else FileMemory(file)
    for name, parameter in layer.named_parameters():
        if (matrix := loaded.stored.pop(parameter, None)) is None:
            continue
        values = matrix.read()
        matrix.done()
        if memory is not None:
            values = torch.frombuffer(memory.take(values.nbytes), dtype=values.dtype).view(values.shape).copy_(values)
        elif place == "cpu":
            values = values.pin_memory() if device.type == "cuda" else values
        else:
            values = values.to(place)
        owner, _, leaf = name.rpartition(".")
        waiting.append(_Waiting(layer.get_submodule(owner), leaf, values, memory is not None))
    if memory is not None:
        memory.store()
    return waiting


class _Buffer:
    """Room for one layer on the device, and when what was in it is no longer read."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.read: torch.cuda.Event | None = None


class _LayersAhead:
    """Hooks of the layers, which keep this alive. They run in turn; of each step, all."""

    def __init__(self, layers: list[tuple[nn.Module, list[_Waiting]]], device: torch.device) -> None:
        self._waiting = [waiting for _, waiting in layers]
        self._device = device
        self._stream = _stream(device)
        most = max(sum(_aligned(each.values.nbytes) for each in waiting) for waiting in self._waiting)
        self._free = [_Buffer(most, device) for _ in range(AHEAD + 1)]
        # What was asked for, in the order in which layers run.
        self._coming: deque[tuple[int, Future[_Buffer]]] = deque()
        self._fetcher = ThreadPoolExecutor(1, "layers-ahead")
        self._used: _Buffer | None = None
        for index, (layer, _) in enumerate(layers):
            layer.register_forward_pre_hook(lambda module, inputs, index=index: self._enter(index))
            layer.register_forward_hook(lambda module, inputs, output: self._leave())

    def _enter(self, index: int) -> None:
        """Gives a layer its weights."""
        # A step that failed left layers out.
        while self._coming and self._coming[0][0] != index:
            self._free.append(self._coming.popleft()[1].result())
        if not self._coming:
            self._ask(index)
        _, future = self._coming.popleft()
        buffer = self._used = future.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        for each, values in zip(self._waiting[index], self._views(buffer, index), strict=True):
            each.owner.register_parameter(each.leaf, nn.Parameter(values, requires_grad=False))
        last = self._coming[-1][0] if self._coming else index
        while self._free and len(self._coming) < AHEAD:
            last = (last + 1) % len(self._waiting)
            self._ask(last)

    def _leave(self) -> None:
        """Lets the weights of the layer that has run be overwritten, once the device has read them."""
        buffer, self._used = self._used, None
        assert buffer is not None
        if self._stream is not None:
            buffer.read = torch.cuda.current_stream(self._device).record_event()
        self._free.append(buffer)

    def _ask(self, index: int) -> None:
        if self._used is not None and not self._free:
            # Of a step that failed within a layer.
            self._leave()
        self._coming.append((index, self._fetcher.submit(self._fetch, index, self._free.pop(0))))

    def _fetch(self, index: int, buffer: _Buffer) -> _Buffer:
        if self._stream is None:
            self._copy(index, buffer)
            return buffer
        with torch.cuda.stream(self._stream):
            if buffer.read is not None:
                self._stream.wait_event(buffer.read)
            self._copy(index, buffer)
        return buffer

    def _copy(self, index: int, buffer: _Buffer) -> None:
        for each, place in zip(self._waiting[index], self._views(buffer, index), strict=True):
            place.copy_(each.values, non_blocking=not each.on_disk)
            if each.on_disk:
                release_pages(each.values.flatten().view(torch.uint8).numpy())

    def _views(self, buffer: _Buffer, index: int) -> list[torch.Tensor]:
        """A layer's parameters in a buffer."""
        views, begin = [], 0
        for each in self._waiting[index]:
            of_values = buffer.memory[begin : begin + each.values.nbytes]
            views.append(of_values.view(each.values.dtype).view(each.values.shape))
            begin += _aligned(each.values.nbytes)
        return views


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """On which weights are copied while others compute."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
