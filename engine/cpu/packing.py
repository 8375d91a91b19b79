"""Weights in the order in which the kernels read them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.cpu.library import Kernels
from pdmesh.kv_memory import private_memory

# kernels/matrix.h: kPanel.
PANEL = 32
_HALF = PANEL // 2
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

    @property
    def num_weights(self) -> int:
        return self.n * self.k

    @property
    def num_bytes(self) -> int:
        """That it takes in memory."""
        return self.values.nbytes + self.bias.nbytes


class Packer:
    """Packs matrices, side by side or interleaved, into one. Of matrices on "meta", it gives what has shapes alone."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._memory = _LargePages()

    def side_by_side(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> PackedMatrix:
        """One matrix whose outputs are those of `weights`, each [n_i, k], one after the other."""
        n, k = sum(len(weight) for weight in weights), weights[0].shape[1]
        values = self._zeros(n, k, weights[0].device)
        base = 0
        for weight in weights:
            self._kernels.pack(values, weight, base, len(weight), 0)
            base += len(weight)
        return PackedMatrix(n, k, values, _bias(torch.cat([_filled(*pair) for pair in _pairs(weights, biases)])))

    def interleaved(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> PackedMatrix:
        """Two matrices [n, k] whose outputs alternate by 16, so that one panel holds both factors of a product."""
        (size, k) = weights[0].shape
        n = 2 * padded(size, _HALF)
        values, bias = self._zeros(n, k, weights[0].device), torch.zeros(n)
        for place, (weight, own_bias) in enumerate(_pairs(weights, biases)):
            self._interleave(values, bias, weight, _filled(weight, own_bias), place * _HALF)
        return PackedMatrix(n, k, values, bias)

    def stacked(self, experts: Sequence[Sequence[torch.Tensor]]) -> PackedMatrix:
        """One matrix of all experts' outputs, expert by expert: of one matrix [n, k] each, padded to panels, or of
        two, `interleaved`. The bias is that of any expert: zeros."""
        (n, k), num_parts = experts[0][0].shape, len(experts[0])
        size = padded(n) if num_parts == 1 else 2 * padded(n, _HALF)
        values = self._zeros(len(experts) * size, k, experts[0][0].device)
        for expert, weights in enumerate(experts):
            for place, weight in enumerate(weights):
                group, stride = (n, 0) if num_parts == 1 else (_HALF, PANEL)
                self._kernels.pack(values, weight, expert * size + place * _HALF, group, stride)
        return PackedMatrix(len(experts) * size, k, values, torch.zeros(size))

    def rotary(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], head_dim: int, rotary_dim: int
    ) -> PackedMatrix:
        """q, k and v in one matrix: of each head of q and k the halves alternate by 16, so that one panel holds what
        turns together; kernels/attention.h, Projection. The first `rotary_dim` dimensions turn."""
        (q, k, v), half = weights, head_dim // 2
        head_columns = 2 * padded(half, _HALF)
        num_turned = (len(q) + len(k)) // head_dim * head_columns
        n = num_turned + len(v)
        values, bias = self._zeros(n, q.shape[1], q.device), torch.zeros(padded(n))
        base = 0
        for weight, own_bias in _pairs(weights, biases)[:2]:
            filled = _filled(weight, own_bias)
            for first in range(0, len(weight), head_dim):
                for place, dims in enumerate(_halves(head_dim, rotary_dim)):
                    rows = first + dims
                    self._interleave(values, bias, weight[rows], filled[rows], base + place * _HALF)
                base += head_columns
        self._kernels.pack(values, v, num_turned, len(v), 0)
        bias[num_turned:n] = _filled(v, biases[2])
        return PackedMatrix(n, q.shape[1], values, bias)

    @staticmethod
    def head_scales(scales: Sequence[torch.Tensor], rotary_dim: int) -> torch.Tensor:
        """Of q's heads and k's, [head_dim] each: float32, one behind the other, as `rotary` orders a head."""
        head_dim = len(scales[0])
        packed = torch.zeros(len(scales), padded(head_dim // 2, _HALF) // _HALF, 2, _HALF)
        for of_head, scale in zip(packed, scales, strict=True):
            for place, dims in enumerate(_halves(head_dim, rotary_dim)):
                pairs = torch.arange(len(dims))
                of_head[pairs // _HALF, place, pairs % _HALF] = scale[dims].float()
        return packed.flatten()

    def _interleave(
        self, values: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, filled: torch.Tensor, base: int
    ) -> None:
        """Puts 16 of a matrix' outputs from column `base` on, the next 16 a panel further, and so on."""
        self._kernels.pack(values, weight, base, _HALF, PANEL)
        outputs = torch.arange(len(weight))
        bias[base + outputs // _HALF * PANEL + outputs % _HALF] = filled

    def _zeros(self, n: int, k: int, device: torch.device) -> torch.Tensor:
        dtype = self._kernels.dtype
        num_values = padded(n) * padded(k, PACK[dtype])
        if device.type == "meta":
            return torch.empty(num_values, dtype=dtype, device=device)
        return torch.frombuffer(self._memory.take(num_values * dtype.itemsize), dtype=dtype)


class _LargePages:
    """Zeroed memory, taken in large chunks."""

    def __init__(self) -> None:
        self._left = memoryview(b"")

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self._left):
            self._left = private_memory(max(_CHUNK_BYTES, num_bytes))
        taken, self._left = self._left[:num_bytes], self._left[padded(num_bytes, _CACHE_LINE) :]
        return taken


def _halves(head_dim: int, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The dimensions that panels hold first, and those beside them: of what turns, then of what does not."""
    turned, still = (
        torch.arange(begin, end).view(2, (end - begin) // 2) for begin, end in ((0, rotary_dim), (rotary_dim, head_dim))
    )
    return torch.cat((turned[0], still[0])), torch.cat((turned[1], still[1]))


def _pairs(
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    return list(zip(weights, biases, strict=True))


def _filled(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(len(weight)) if bias is None else bias.float()


def _bias(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, padded(len(values)) - len(values)))
