"""A decoder as a list of the kernels' operations: what they read, where they write, and with which weights."""

import ctypes
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.nn import functional as F

from engine.attention import Scores
from engine.cpu.angles import Angles
from engine.cpu.library import Activation, Finish, Format, Kind, Operation, ScoreRule
from engine.cpu.packing import PACK, PackedMatrix, padded

# kernels/mixture.h: kMaxExperts.
MAX_EXPERTS = 1024

# Beyond a row's values: rows a multiple of 4096 bytes apart would fight for the same places of the first-level cache.
_ROW_PADDING = 32


def row_values(width: int) -> int:
    """Values from one row of `width` to the next."""
    return padded(width) + _ROW_PADDING


@dataclass(frozen=True, slots=True)
class Rows:
    """A buffer of `width` values for each token of a step; `values` [max_tokens, padded width] begin as zeros.

    Attributes:
        outputs_only: It holds rows of those tokens alone whose hidden states are wanted, one after the other.
        rank_bytes: Of partial results: where each rank has such a buffer, from one rank's to the next one's.
        rank: Whose this one is.
    """

    values: torch.Tensor
    width: int
    outputs_only: bool = False
    rank_bytes: int = 0
    rank: int = 0

    def of_outputs(self) -> "Rows":
        """The same memory, for rows of the wanted tokens alone."""
        return replace(self, outputs_only=True)

    @property
    def address(self) -> int:
        return self.values.data_ptr()

    @property
    def first_rank_address(self) -> int:
        return self.address - self.rank * self.rank_bytes

    @property
    def row_bytes(self) -> int:
        return self.values.stride(0) * self.values.itemsize


@dataclass(frozen=True, slots=True)
class RowNorm:
    """How rows are normalised, in float32.

    Attributes:
        scale: [width].
        bias: [width], of a centred norm; None: none.
        centred: To mean 0 and unit variance (layer norm); else to unit root mean square.
    """

    scale: torch.Tensor
    epsilon: float
    bias: torch.Tensor | None = None
    centred: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """Operations that run in one call.

    Attributes:
        layer: Whose weights they read; None before the first, and where the program is not cut so.
        partial: The partial results that are to be summed over the ranks then.
    """

    operations: "ctypes.Array[Operation]"
    layer: int | None
    partial: Rows | None


class Program:
    """Built once, run each step.

    It keeps alive all that was passed in, of which its operations hold addresses.

    Attributes:
        dtype: Of weights, and of what products read.
    """

    def __init__(self, max_tokens: int, dtype: torch.dtype) -> None:
        assert dtype in PACK
        self._max_tokens = max_tokens
        self.dtype = dtype
        self._operations: list[Operation] = []
        self._kept: list[torch.Tensor | Angles] = []
        # Of each layer, its first operation.
        self._layer_starts: list[int] = []
        # Of each sum.
        self._partials: list[Rows] = []
        # What operations write, by itself.
        self._written: dict[int, torch.Tensor] = {}
        self._num_copied_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Of the rows that operations write, and of copies of norms and positions. Other rows take no memory."""
        return sum(values.nbytes for values in self._written.values()) + self._num_copied_bytes

    def rows(self, width: int, dtype: torch.dtype | None = None, *, per_token: int = 1) -> Rows:
        """A buffer, of the weights' dtype if none is given."""
        num_rows = self._max_tokens * per_token
        return Rows(torch.zeros(num_rows, row_values(width), dtype=dtype or self.dtype), width)

    def embed(self, table: PackedMatrix, first_token: int, output: Rows, scale: float = 1.0) -> None:
        """output = the table's rows of the tokens, which begin with `first_token`'s, times `scale`; of tokens that it
        has not, zeros. `output` is float32, as are all residuals."""
        operation = Operation(kind=Kind.EMBED, n=table.n, k=table.k, first=first_token, scale=scale)
        self._add(operation, None, output, weight=table.values, format=table.format)

    def add_positions(self, table: torch.Tensor, offset: int, output: Rows) -> None:
        """output += each token's row of `table`, [positions + offset, width], whose row `offset` is of position 0."""
        wide = self._copied(table.to(self.dtype))
        operation = Operation(kind=Kind.ADD_POSITIONS, k=wide.shape[1], first=offset)
        self._add(operation, None, output, weight=wide)

    def normalize(self, source: Rows, norm: RowNorm, output: Rows, finish: Finish = Finish.NARROW) -> None:
        """output = the norm of float32 rows, or that on top of what is there; both may be the same memory."""
        assert finish in (Finish.NARROW, Finish.STORE, Finish.ADD)
        kind = Kind.LAYER_NORM if norm.centred else Kind.RMS_NORM
        operation = Operation(kind=kind, finish=finish, epsilon=norm.epsilon, n=source.width)
        bias = None if norm.bias is None else self._copied(norm.bias.float())
        self._add(operation, source, output, weight=self._copied(norm.scale.float()), bias=bias)

    def narrow(self, source: Rows, output: Rows) -> None:
        """output = float32 rows, rounded to the weights' dtype."""
        self._add(Operation(kind=Kind.NARROW, n=source.width), source, output)

    def project(
        self, source: Rows, matrix: PackedMatrix, output: Rows, finish: Finish, activation: Activation = Activation.NONE
    ) -> None:
        """output = source times the matrix, or what `finish` makes of it."""
        assert finish is not Finish.PROJECT_HEADS
        self._project(Operation(kind=Kind.PROJECT, finish=finish, activation=activation), source, matrix, output)

    def project_heads(self, source: Rows, matrix: PackedMatrix, queries: Rows, layer: int, angles: Angles) -> None:
        """Makes q, k and v by a `Packer.rotary` matrix: turned queries to rows, turned keys and values to the cache."""
        self._kept.append(angles)
        operation = Operation(
            kind=Kind.PROJECT, finish=Finish.PROJECT_HEADS, layer=layer, rotation=ctypes.pointer(angles.rotation)
        )
        self._project(operation, source, matrix, queries)

    def finish_heads(
        self,
        sums: Rows,
        queries: Rows,
        layer: int,
        angles: Angles,
        scales: torch.Tensor | None = None,
        epsilon: float = 0.0,
    ) -> None:
        """What `project_heads` does, of `sums` of such a matrix: for where heads are needed whole.

        Args:
            sums: Float32.
            scales: Of `Packer.head_scales`, where q and k are normalised head by head.
            epsilon: Of that norm.
        """
        self._kept.append(angles)
        operation = Operation(
            kind=Kind.FINISH_HEADS, epsilon=epsilon, layer=layer, n=sums.width, rotation=ctypes.pointer(angles.rotation)
        )
        self._add(operation, sums, queries, weight=scales)

    def attend(self, layer: int, queries: Rows, output: Rows, scores: Scores) -> None:
        """Queries of all tokens; outputs of all, or of the wanted ones."""
        slopes = torch.tensor(scores.slopes, dtype=torch.float32)
        self._kept.append(slopes)
        rule = ScoreRule(scores.scale, scores.soft_cap or 0.0, slopes.data_ptr() if scores.slopes else None)
        operation = Operation(kind=Kind.ATTEND, layer=layer, window=scores.window or 0, scores=rule)
        self._add(operation, queries, output)

    def route(self, logits: Rows, num_experts: int, num_chosen: int, *, whole: bool) -> None:
        """Chooses each row's experts, by float32 logits, for the operations on experts that follow.

        Args:
            whole: The shares of those chosen are scaled to add up to 1.
        """
        assert num_chosen <= num_experts <= MAX_EXPERTS
        operation = Operation(kind=Kind.ROUTE, n=num_experts, k=num_chosen, whole_shares=whole)
        self._add(operation, logits, logits)

    def gather(self, source: Rows, output: Rows) -> None:
        """Copies rows, of the weights' dtype, to `output`, once for each expert chosen, expert by expert."""
        self._add(Operation(kind=Kind.GATHER, n=source.width), source, output)

    def project_experts(
        self,
        source: Rows,
        matrices: PackedMatrix,
        num_experts: int,
        output: Rows,
        finish: Finish,
        activation: Activation = Activation.NONE,
    ) -> None:
        """As `project`, of gathered rows, each with its own expert's matrix, which lie in `matrices` in a line."""
        operation = Operation(kind=Kind.PROJECT_EXPERTS, finish=finish, activation=activation, num_experts=num_experts)
        self._project(operation, source, matrices, output)

    def combine_experts(self, source: Rows, output: Rows, finish: Finish) -> None:
        """output = each row's experts' rows of `source`, both float32, by their shares; or that on top of it."""
        self._add(Operation(kind=Kind.COMBINE_EXPERTS, finish=finish, n=source.width), source, output)

    def cap(self, logits: Rows, cap: float) -> None:
        """logits = cap * tanh(logits / cap), of float32 rows."""
        self._add(Operation(kind=Kind.CAP, n=logits.width, scale=cap), logits, logits)

    def select(self, source: Rows, output: Rows) -> None:
        """output = the wanted tokens' rows of `source`, both float32 and not the same memory."""
        assert output.outputs_only
        assert source.values.dtype == output.values.dtype == torch.float32
        self._add(Operation(kind=Kind.SELECT, k=source.width), source, output)

    def reduce(self, partial: Rows, output: Rows, finish: Finish) -> None:
        """output = the sum of all ranks' rows of `partial`, or that on top of what is there."""
        operation = Operation(
            kind=Kind.REDUCE,
            finish=finish,
            n=padded(partial.width),
            first=len(self._partials),
            rank_bytes=partial.rank_bytes,
        )
        self._add(operation, partial, output)
        operation.input = partial.first_rank_address
        self._partials.append(partial)

    def begin_layer(self) -> None:
        """Says that what is added from now on reads the next layer's weights."""
        self._layer_starts.append(len(self._operations))

    def compile(self) -> "ctypes.Array[Operation]":
        """What `Kernels.run` takes. Valid while this program lives."""
        return (Operation * len(self._operations))(*self._operations)

    def segments(self, *, sums: bool, layers: bool) -> "list[Segment]":
        """As `compile`, cut before each sum, or before each layer, or both.

        A sum that finds no group takes this rank's own rows, into which others' were added meanwhile.
        """
        partials = [index for index, operation in enumerate(self._operations) if operation.kind == Kind.REDUCE]
        ends = dict(zip(partials, self._partials, strict=True)) if sums else {}
        starts = {index: layer for layer, index in enumerate(self._layer_starts)} if layers else {}
        segments, layer = [], None
        cuts = sorted({0, *ends, *starts, len(self._operations)})
        for begin, end in pairwise(cuts):
            layer = starts.get(begin, layer)
            operations = (Operation * (end - begin))(*self._operations[begin:end])
            for operation in operations:
                # Each run of the kernels counts its own sums.
                if operation.kind == Kind.REDUCE:
                    operation.first -= sum(index < begin for index in partials)
            segments.append(Segment(operations, layer, ends.get(end)))
        return segments

    def _project(self, operation: Operation, source: Rows, matrix: PackedMatrix, output: Rows) -> None:
        assert source.width == matrix.k
        operation.n, operation.k = matrix.n, matrix.k
        self._add(operation, source, output, weight=matrix.values, format=matrix.format, bias=matrix.bias)

    def _add(
        self,
        operation: Operation,
        source: Rows | None,
        output: Rows,
        *,
        weight: torch.Tensor | None = None,
        format: Format = Format.ELEMENT,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Appends an operation, told where it reads and writes."""
        self._kept += [rows.values for rows in (source, output) if rows is not None]
        self._written[id(output.values)] = output.values
        self._kept += [tensor for tensor in (weight, bias) if tensor is not None]
        operation.outputs_only = output.outputs_only
        if source is not None:
            operation.input, operation.input_bytes = source.address, source.row_bytes
        operation.output, operation.output_bytes = output.address, output.row_bytes
        operation.weight = None if weight is None else weight.data_ptr()
        operation.format = format
        operation.bias = None if bias is None else bias.data_ptr()
        self._operations.append(operation)

    def _copied(self, values: torch.Tensor) -> torch.Tensor:
        """Rows padded to whole vectors with zeros, contiguous."""
        width = values.shape[-1]
        copied = F.pad(values, (0, padded(width) - width)).contiguous()
        self._num_copied_bytes += copied.nbytes
        return copied
