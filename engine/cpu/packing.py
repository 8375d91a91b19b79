"""Weights in the order in which the kernels read them."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.cpu.library import Kernels

# kernels/matrix.h: kPanel.
PANEL = 32
# Values of a row that one multiply-add takes.
PACK = {torch.float32: 1, torch.bfloat16: 2}
_CHUNK_BYTES = 64 << 20
_CACHE_LINE = 64


def padded(size: int, multiple: int = PANEL) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """Of a linear map with n outputs and k inputs: its packed values, and its bias, in float32, padded to panels."""

    n: int
    k: int
    values: torch.Tensor
    bias: torch.Tensor


class Packer:
    """Packs matrices, side by side or interleaved, into one."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._memory = _LargePages()

    def side_by_side(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> PackedMatrix:
        """One matrix whose outputs are those of `weights`, each [n_i, k], one after the other."""
        n, k = sum(len(weight) for weight in weights), weights[0].shape[1]
        values = self._zeros(n, k)
        base = 0
        for weight in weights:
            self._kernels.pack(values, weight, base, len(weight), 0)
            base += len(weight)
        return PackedMatrix(n, k, values, _bias(torch.cat([_filled(*pair) for pair in _pairs(weights, biases)])))

    def interleaved(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> PackedMatrix:
        """Two matrices [n, k] whose outputs alternate by 16, so that one panel holds both factors of a product."""
        half = PANEL // 2
        (size, k) = weights[0].shape
        n = 2 * padded(size, half)
        values, bias = self._zeros(n, k), torch.zeros(n // PANEL, 2, half)
        for place, (weight, own_bias) in enumerate(_pairs(weights, biases)):
            self._kernels.pack(values, weight, place * half, half, PANEL)
            bias[:, place] = _bias(_filled(weight, own_bias), half).view(-1, half)
        return PackedMatrix(n, k, values, bias.flatten())

    def _zeros(self, n: int, k: int) -> torch.Tensor:
        dtype = self._kernels.dtype
        num_values = padded(n) * padded(k, PACK[dtype])
        return torch.frombuffer(self._memory.take(num_values * dtype.itemsize), dtype=dtype)


class _LargePages:
    """Zeroed memory of 2 MiB pages where the system has them: fewer addresses to look up when all weights are read.

    It is taken in large chunks, of which what is never written costs nothing.
    """

    def __init__(self) -> None:
        self._left = memoryview(b"")

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self._left):
            chunk = mmap.mmap(-1, max(_CHUNK_BYTES, num_bytes))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                chunk.madvise(mmap.MADV_HUGEPAGE)
            self._left = memoryview(chunk)
        taken, self._left = self._left[:num_bytes], self._left[padded(num_bytes, _CACHE_LINE) :]
        return taken


def _pairs(
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    return list(zip(weights, biases, strict=True))


def _filled(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(len(weight)) if bias is None else bias.float()


def _bias(values: torch.Tensor, multiple: int = PANEL) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, padded(len(values), multiple) - len(values)))
