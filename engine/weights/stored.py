"""Matrices that are still in their checkpoint: whoever computes with them in an order of their own reads them there."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine.weights.checkpoint import (
    Checkpoint,
    FileRows,
    Part,
    StoredTensor,
    cut_short,
    not_finite,
    part_bytes,
    unreadable,
)
from engine.weights.quantized import GROUP, QuantizedWeight, Quantizer, WeightFormat
from pdmesh.errors import ConfigError

# Of a matrix that is quantised: read at a time.
_PIECE_VALUES = 1 << 20


class Progress:
    """Counts the bytes that were read.

    Args:
        on_progress: Called with (bytes read, bytes in all), at the start and after each tensor.
    """

    def __init__(self, total_bytes: int, on_progress: Callable[[int, int], None]) -> None:
        self._on_progress = on_progress
        self._total = total_bytes
        self._done = 0
        on_progress(0, total_bytes)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._on_progress(self._done, self._total)


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """What a parameter without memory is to be: a matrix of a checkpoint, or a part of one. Read once, one way or the
    other.

    Attributes:
        dtype: What the model computes in.
    """

    tensor: StoredTensor
    part: Part
    dtype: torch.dtype
    checkpoint: Checkpoint
    progress: Progress

    def rows(self) -> FileRows | None:
        """Where the rows lie; None where only `read` can tell the values."""
        return self.checkpoint.rows(self.tensor.name, self.part)

    def read(self) -> torch.Tensor:
        """The values, in memory of their own. Raises ConfigError."""
        return self.checkpoint.read(self.tensor.name, self.dtype, self.part)

    def read_quantized(self, weight_format: WeightFormat, quantizer: Quantizer | None) -> QuantizedWeight:
        """The matrix in few bits; takes memory for it and for a piece of its values. Raises ConfigError."""
        n, k = self.part.shape_of(self.tensor.shape)
        quantized = QuantizedWeight.empty(weight_format, n, k, self.dtype)
        # Whole heads, which of some tensors alone can be read.
        head_dim = self.checkpoint.config.head_dim
        rows_each = max(1, _PIECE_VALUES // k // head_dim) * head_dim
        first = 0
        for run in self.part.runs_of(self.tensor.shape):
            for begin in range(0, len(run), rows_each):
                # In float32: what a file's own scales and integers make may be no number of the model's dtype.
                piece = replace(self.part, rows=run[begin : begin + rows_each])
                values = self.checkpoint.read(self.tensor.name, torch.float32, piece)
                try:
                    quantized.store_rows(first, values, quantizer)
                except ConfigError as error:
                    raise ConfigError(
                        f"{self.tensor.file}: tensor {self.tensor.name} {error}: use --quantization none"
                    ) from error
                first += len(values)
        return quantized

    def check_groups(self, weight_format: WeightFormat) -> None:
        """Raises ConfigError where the part's columns cut through a group: its weights would not be the whole's."""
        num_columns = Part(transposed=self.part.transposed).shape_of(self.tensor.shape)[1]
        columns = self.part.columns or range(num_columns)
        if columns.start % GROUP or (columns.stop % GROUP and columns.stop != num_columns):
            raise ConfigError(
                f"--quantization {weight_format.name} has a scale for each {GROUP} columns, and a rank would hold "
                f"columns {columns.start} to {columns.stop} of {self.tensor.name}: choose another --tp, or none"
            )

    def done(self) -> None:
        """Says that the values were read."""
        self.progress.add(part_bytes(self.tensor, self.part))

    def not_finite(self) -> ConfigError:
        return not_finite(self.tensor, self.dtype)

    def cut_short(self) -> ConfigError:
        return cut_short(self.tensor)

    def unreadable(self, reason: str) -> ConfigError:
        return unreadable(self.tensor, reason)
