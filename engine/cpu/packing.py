"""Weights as the kernels read them: packed, or where they lie."""

import os
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from engine.cpu.library import Format, Kernels, PackStatus
from engine.cpu.rows_in_place import MappedRows, address_rows, rows_in_place
from engine.weights.checkpoint import FileRows
from engine.weights.offload_file import FileMemory
from engine.weights.quantized import UNQUANTIZED, Quantization, WeightFormat, quantize
from engine.weights.stored import StoredMatrix
from engine.weights.weight_file import WeightFile
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
    """Of a linear map with n outputs and k inputs: its values, and its bias, in float32, padded to panels.

    Attributes:
        values: Packed, of the kernels' dtype; bytes where they are quantised, scales among them; or the addresses of
            rows that lie in mapped files.
        files: In which they lie.
        mapped_bytes: Of these rows.
    """

    n: int
    k: int
    values: torch.Tensor
    bias: torch.Tensor
    format: Format = Format.ELEMENT
    files: tuple[WeightFile, ...] = ()
    mapped_bytes: int = 0

    @property
    def num_weights(self) -> int:
        return self.n * self.k

    @property
    def num_bytes(self) -> int:
        """That it takes in memory, the system's cache of files among it."""
        return self.values.nbytes + self.bias.nbytes + self.mapped_bytes


class Packer:
    """Packs matrices, side by side or interleaved, into one. Of matrices on "meta" that are stored nowhere, it gives
    what has shapes alone.

    Args:
        stored: Where those lie that have no values; see `LoadedModel.stored`. It loses those that are packed.
        num_threads: That pack.
        quantization: Of matrices, where nothing else is said.
        maps: Matrices that lie ready in their files are read there.
    """

    def __init__(
        self,
        kernels: Kernels,
        stored: MutableMapping[torch.Tensor, StoredMatrix],
        num_threads: int,
        quantization: Quantization = UNQUANTIZED,
        *,
        maps: bool = False,
    ) -> None:
        self._kernels = kernels
        self._stored = stored
        self._num_threads = num_threads
        self._quantization = quantization
        self._maps = maps
        self._memory: _LargePages | FileMemory = _LargePages()

    @contextmanager
    def into(self, memory: FileMemory | None) -> Iterator[None]:
        """What is packed within waits in a file then, if one is given."""
        if memory is None:
            yield
            return
        large_pages, self._memory = self._memory, memory
        try:
            yield
            memory.store()
        finally:
            self._memory = large_pages

    @property
    def weight_format(self) -> WeightFormat | None:
        """Of the model's matrices."""
        return self._quantization.format

    def side_by_side(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        weight_format: WeightFormat | None = None,
    ) -> PackedMatrix:
        """One matrix whose outputs are those of `weights`, each [n_i, k], one after the other; quantised if said."""
        base, places = 0, []
        for weight in weights:
            places.append(base + torch.arange(len(weight)))
            base += len(weight)
        return self._packed(base, weights, biases, places, weight_format)

    def interleaved(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> PackedMatrix:
        """Two matrices [n, k] whose outputs alternate by 16, so that one panel holds both factors of a product."""
        first = _alternating(torch.arange(len(weights[0])))
        places = [first, first + _HALF]
        return self._packed(2 * padded(len(first), _HALF), weights, biases, places, self._quantization.format)

    def stacked(self, experts: Sequence[Sequence[torch.Tensor]]) -> PackedMatrix:
        """One matrix of all experts' outputs, expert by expert: of one matrix [n, k] each, padded to panels, or of
        two, `interleaved`. The bias is that of any expert: zeros."""
        n, num_parts = len(experts[0][0]), len(experts[0])
        size = padded(n) if num_parts == 1 else 2 * padded(n, _HALF)
        outputs = torch.arange(n)
        within = outputs if num_parts == 1 else _alternating(outputs)
        weights = [weight for expert in experts for weight in expert]
        places = [expert * size + part * _HALF + within for expert in range(len(experts)) for part in range(num_parts)]
        return self._matrix(len(experts) * size, weights, torch.zeros(size), places, self._quantization.format)

    def rotary(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], head_dim: int, rotary_dim: int
    ) -> PackedMatrix:
        """q, k and v in one matrix: of each head of q and k the halves alternate by 16, so that one panel holds what
        turns together; kernels/attention.h, Projection. The first `rotary_dim` dimensions turn."""
        q, k, v = weights
        n, places = _rotary_places(len(q), len(k), len(v), head_dim, rotary_dim)
        return self._packed(n, weights, biases, places, self._quantization.format)

    @staticmethod
    def head_scales(scales: Sequence[torch.Tensor], rotary_dim: int) -> torch.Tensor:
        """Of q's heads and k's, [head_dim] each: float32, one behind the other, as `rotary` orders a head."""
        head_dim = len(scales[0])
        packed = torch.zeros(len(scales), 2 * padded(head_dim // 2, _HALF))
        for of_head, scale in zip(packed, scales, strict=True):
            of_head[_places_in_head(head_dim, rotary_dim)] = scale.float()
        return packed.flatten()

    def _packed(
        self,
        n: int,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        places: Sequence[torch.Tensor],
        weight_format: WeightFormat | None,
    ) -> PackedMatrix:
        """The matrix whose outputs `places` are those of `weights`, and all others zero."""
        packed_bias = torch.zeros(padded(n))
        for bias, outputs in zip(biases, places, strict=True):
            if bias is not None:
                packed_bias[outputs] = bias.float()
        return self._matrix(n, weights, packed_bias, places, weight_format)

    def _matrix(
        self,
        n: int,
        weights: Sequence[torch.Tensor],
        bias: torch.Tensor,
        places: Sequence[torch.Tensor],
        weight_format: WeightFormat | None,
    ) -> PackedMatrix:
        """As `_packed`; where all weights lie ready in mapped files, by the addresses of their rows."""
        k = weights[0].shape[1]
        if in_place := self._in_place(weights, weight_format):
            row_bytes = k * self._kernels.dtype.itemsize
            table = address_rows(padded(n), row_bytes, in_place, places)
            files = tuple(dict.fromkeys(rows.file for rows in in_place if rows.file is not None))
            mapped_bytes = sum(rows.num_bytes for rows in in_place)
            return PackedMatrix(n, k, table, bias, Format.ROWS, files, mapped_bytes)
        values = self._zeros(n, weights[0], weight_format)
        for weight, outputs in zip(weights, places, strict=True):
            self._pack(values, outputs, weight, weight_format)
        return PackedMatrix(n, k, values, bias, _format(weight_format))

    def _in_place(self, weights: Sequence[torch.Tensor], weight_format: WeightFormat | None) -> list[MappedRows]:
        """The rows of all these, if they are to be read where they lie, and lie ready. Raises ConfigError."""
        if not self._maps or weight_format is not None or not all(weight in self._stored for weight in weights):
            return []
        lying = [rows_in_place(self._stored[weight], self._kernels.dtype) for weight in weights]
        if None in lying:
            return []
        mapped = []
        for weight, rows in zip(weights, lying, strict=True):
            assert rows is not None
            mapped.append(MappedRows(self._stored.pop(weight), rows, weight.shape[1]))
            mapped[-1].check(self._kernels, self._num_threads)
            if isinstance(self._memory, FileMemory):
                # A file of its own is written at once, and the system maps it in larger pieces than most.
                mapped[-1].move(self._memory.take(mapped[-1].num_bytes))
        return mapped

    def _pack(
        self, values: torch.Tensor, outputs: torch.Tensor, weight: torch.Tensor, weight_format: WeightFormat | None
    ) -> None:
        """Stores a matrix in a packed one, as its `outputs`.

        Raises ConfigError where the checkpoint cannot give the matrix, or it holds what is not finite.
        """
        if values.is_meta:
            return
        stored, k = self._stored.pop(weight, None), weight.shape[1]
        # From the panel with the first output on.
        first = int(outputs.min()) // PANEL * PANEL
        rows = torch.full((int(outputs.max()) + 1 - first,), -1)
        panels = values[first * _values_of_output(k, values.dtype, weight_format) :]
        if weight_format is not None:
            quantizer = self._quantization.quantizer
            rows[outputs - first] = torch.arange(len(weight))
            if stored is None:
                quantized = quantize(weight, weight_format, quantizer)
            else:
                quantized = stored.read_quantized(weight_format, quantizer)
                stored.done()
            self._kernels.pack_quantized(panels, rows, quantized)
            return
        source = weight if stored is None else stored.rows() or stored.read()
        rows[outputs - first] = _row_numbers(source)
        status = self._kernels.pack(panels, k, rows, source, self._num_threads)
        if stored is None:
            assert status == PackStatus.PACKED, "what lies in memory was found finite when it was read"
            return
        match status:
            case PackStatus.PACKED:
                stored.done()
            case PackStatus.NOT_FINITE:
                raise stored.not_finite()
            case PackStatus.CUT_SHORT:
                raise stored.cut_short()
            case error:
                raise stored.unreadable(os.strerror(error))

    def _zeros(self, n: int, like: torch.Tensor, weight_format: WeightFormat | None) -> torch.Tensor:
        """Of a packed matrix of n outputs, of which `like` makes some."""
        dtype = self._kernels.dtype if weight_format is None else torch.uint8
        num_values = padded(n) * _values_of_output(like.shape[1], dtype, weight_format)
        if like.is_meta and like not in self._stored:
            return torch.empty(num_values, dtype=dtype, device="meta")
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


def _format(weight_format: WeightFormat | None) -> Format:
    return Format.ELEMENT if weight_format is None else Format[weight_format.name.upper()]


def _values_of_output(k: int, dtype: torch.dtype, weight_format: WeightFormat | None) -> int:
    """Of `dtype`, that each output of a packed matrix takes; bytes of one that is quantised."""
    return padded(k, PACK[dtype]) if weight_format is None else weight_format.num_bytes(1, k)


def _row_numbers(source: torch.Tensor | FileRows) -> torch.Tensor:
    if isinstance(source, torch.Tensor):
        return torch.arange(len(source))
    return torch.cat([torch.arange(run.start, run.stop) for run in source.runs])


def _alternating(outputs: torch.Tensor) -> torch.Tensor:
    """Where these come to lie if every 16 of them are followed by as many of another matrix'."""
    return outputs // _HALF * PANEL + outputs % _HALF


# Layers are alike.
@cache
def _rotary_places(
    num_q: int, num_k: int, num_v: int, head_dim: int, rotary_dim: int
) -> tuple[int, tuple[torch.Tensor, ...]]:
    """How many outputs a rotary matrix has, and which of them those of q, k and v are."""
    in_head, head_columns = _places_in_head(head_dim, rotary_dim), 2 * padded(head_dim // 2, _HALF)
    base, places = 0, []
    for num_outputs in (num_q, num_k):
        heads = base + head_columns * torch.arange(num_outputs // head_dim)
        places.append((heads[:, None] + in_head).flatten())
        base += head_columns * len(heads)
    return base + num_v, (*places, base + torch.arange(num_v))


def _places_in_head(head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Where the panels of a head hold each of its dimensions: the halves of what turns, then of what does not,
    alternating by 16."""
    places = torch.empty(head_dim, dtype=torch.int64)
    halves = [torch.arange(*ends).view(2, -1) for ends in ((0, rotary_dim), (rotary_dim, head_dim))]
    for place, dims in enumerate(torch.cat(halves, dim=1)):
        places[dims] = place * _HALF + _alternating(torch.arange(len(dims)))
    return places
