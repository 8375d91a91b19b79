"""A decoder as a list of the kernels' operations: what they read, where they write, and with which weights."""

import ctypes
from dataclasses import dataclass, replace

import torch

from engine.cpu.library import Finish, Kind, Operation
from engine.cpu.packing import PACK, PackedMatrix, padded

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


class Program:
    """Built once, run each step.

    `operations` hold addresses of all that was passed in; `keep` keeps that alive.
    """

    def __init__(self, max_tokens: int, dtype: torch.dtype) -> None:
        assert dtype in PACK
        self._max_tokens = max_tokens
        self._dtype = dtype
        self._operations: list[Operation] = []
        self._kept: list[torch.Tensor] = []
        # Of each sum.
        self._partials: list[Rows] = []

    def rows(self, width: int, dtype: torch.dtype | None = None) -> Rows:
        """A buffer, of the weights' dtype if none is given."""
        return Rows(torch.zeros(self._max_tokens, row_values(width), dtype=dtype or self._dtype), width)

    def embed(self, table: PackedMatrix, first_token: int, output: Rows) -> None:
        """output = the table's rows of the tokens, which begin with `first_token`'s; of tokens that it has not, zeros.
        `output` is float32, as are all residuals."""
        self._add(Kind.EMBED, None, output, weight=table.values, n=table.n, k=table.k, first=first_token)

    def rms_norm(self, source: Rows, scale: torch.Tensor, epsilon: float, output: Rows) -> None:
        wide = torch.zeros(padded(source.width))
        wide[: source.width] = scale
        self._add(Kind.NORMALIZE, source, output, weight=wide, epsilon=epsilon, n=source.width)

    def project(self, source: Rows, matrix: PackedMatrix, output: Rows, finish: Finish, layer: int = 0) -> None:
        """output = source times the matrix, or what `finish` makes of it."""
        assert source.width == matrix.k
        self._add(
            Kind.PROJECT,
            source,
            output,
            weight=matrix.values,
            bias=matrix.bias,
            finish=finish,
            layer=layer,
            n=matrix.n,
            k=matrix.k,
        )

    def finish_heads(
        self, sums: Rows, queries: Rows, layer: int, scales: torch.Tensor | None = None, epsilon: float = 0.0
    ) -> None:
        """What `Finish.ROTATE` does, of `sums` of a `Packer.rotary` matrix: where heads are needed whole.

        Args:
            sums: Float32.
            scales: Of `Packer.head_scales`, where q and k are normalised head by head.
            epsilon: Of that norm.
        """
        self._add(Kind.FINISH_HEADS, sums, queries, weight=scales, epsilon=epsilon, layer=layer, n=sums.width)

    def attend(self, layer: int, queries: Rows, output: Rows, window: int | None) -> None:
        """Queries of all tokens; outputs of all, or of the wanted ones. With a window, of its last so many keys."""
        self._add(Kind.ATTEND, queries, output, layer=layer, window=window or 0)

    def select(self, source: Rows, output: Rows) -> None:
        """output = the wanted tokens' rows of `source`, both float32 and not the same memory."""
        assert output.outputs_only
        assert source.values.dtype == output.values.dtype == torch.float32
        self._add(Kind.SELECT, source, output, k=source.width)

    def reduce(self, partial: Rows, output: Rows, finish: Finish) -> None:
        """output = the sum of all ranks' rows of `partial`, or that on top of what is there."""
        self._add(
            Kind.REDUCE,
            partial,
            output,
            finish=finish,
            n=padded(partial.width),
            first=len(self._partials),
            rank_bytes=partial.rank_bytes,
        )
        self._partials.append(partial)

    def compile(self) -> "ctypes.Array[Operation]":
        """What `Kernels.run` takes. Valid while this program lives."""
        return (Operation * len(self._operations))(*self._operations)

    def segments(self) -> "list[tuple[ctypes.Array[Operation], Rows | None]]":
        """As `compile`, cut before each sum: what to run, and the partial results that are whole then.

        A sum that finds no group takes this rank's own rows, into which others' were added meanwhile.
        """
        cuts = [index for index, operation in enumerate(self._operations) if operation.kind == Kind.REDUCE]
        segments: list[tuple[ctypes.Array[Operation], Rows | None]] = []
        for begin, end, partial in zip([0, *cuts], [*cuts, None], [*self._partials, None], strict=True):
            operations = self._operations[begin:end]
            segments.append(((Operation * len(operations))(*operations), partial))
        return segments

    def _add(
        self,
        kind: Kind,
        source: Rows | None,
        output: Rows,
        *,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        finish: Finish = Finish.STORE,
        layer: int = 0,
        epsilon: float = 0.0,
        n: int = 0,
        k: int = 0,
        window: int = 0,
        first: int = 0,
        rank_bytes: int = 0,
    ) -> None:
        self._kept += [rows.values for rows in (source, output) if rows is not None]
        self._kept += [tensor for tensor in (weight, bias) if tensor is not None]
        self._operations.append(
            Operation(
                kind=kind,
                finish=finish,
                outputs_only=output.outputs_only,
                layer=layer,
                epsilon=epsilon,
                input=None if source is None else source.first_rank_address if kind is Kind.REDUCE else source.address,
                input_bytes=0 if source is None else source.row_bytes,
                output=output.address,
                output_bytes=output.row_bytes,
                weight=None if weight is None else weight.data_ptr(),
                bias=None if bias is None else bias.data_ptr(),
                n=n,
                k=k,
                window=window,
                first=first,
                rank_bytes=rank_bytes,
            )
        )
