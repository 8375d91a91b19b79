"""A checkpoint: a model's config and its tensors, whatever the file format."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from engine.model_config import ModelConfig
from engine.weights.tensor_names import TensorNames
from engine.weights.weight_file import WeightFile
from pdmesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a file.

    Attributes:
        name: As in a Hugging Face checkpoint of the family, e.g. "model.layers.0.self_attn.q_proj.weight".
        shape: Of its values, not of its encoding.
        encoding: The file format's name of how values are stored, e.g. "BF16" or "Q4_1".
        num_bytes: Size in the file.
        file: Where it lies.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    num_bytes: int
    file: Path


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows and columns of a stored tensor: None for all. Of a vector, `rows` says which values.

    Only a matrix has columns. A range outside of the tensor, or with a step, is a defect of the caller's.

    Attributes:
        rows: Or several runs of them, one after the other.
        transposed: Of the stored matrix's transpose: `rows` and `columns` are this one's.
    """

    rows: range | tuple[range, ...] | None = None
    columns: range | None = None
    transposed: bool = False

    def runs_of(self, shape: tuple[int, ...]) -> tuple[range, ...]:
        """The runs of rows, of a tensor of this shape with one dimension or more."""
        num_rows = self._seen(shape)[0]
        runs = self.rows if isinstance(self.rows, tuple) else (self.rows,)
        return tuple(_within(run, num_rows) for run in runs)

    def rows_of(self, shape: tuple[int, ...]) -> range:
        """The rows, where they are one run."""
        (rows,) = self.runs_of(shape)
        return rows

    def columns_of(self, shape: tuple[int, ...]) -> range:
        """The columns, of a matrix of this shape."""
        assert len(shape) == 2, f"only a matrix has columns, not a tensor of shape {shape}"
        return _within(self.columns, self._seen(shape)[1])

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What shape the part of a tensor of this shape has."""
        if self.rows is None and self.columns is None:
            return self._seen(shape)
        num_rows = sum(map(len, self.runs_of(shape)))
        return (num_rows, *(self._seen(shape)[1:] if self.columns is None else (len(self.columns_of(shape)),)))

    def _seen(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if self.transposed else shape


WHOLE = Part()


def part_bytes(tensor: StoredTensor, part: Part) -> int:
    """What a part takes in the file: its share of `tensor.num_bytes`, rounded down where it cuts through a block."""
    num_values = math.prod(tensor.shape)
    return tensor.num_bytes * math.prod(part.shape_of(tensor.shape)) // num_values if num_values else 0


@dataclass(frozen=True, slots=True)
class FileRows:
    """A part of a matrix as it lies in an open file: plain values in the machine's byte order.

    Attributes:
        offset: Of the part's first column in the matrix' first row, in bytes.
        row_bytes: From one row to the next.
        runs: The part's rows, counted from the matrix' first.
    """

    file: WeightFile
    dtype: torch.dtype
    offset: int
    row_bytes: int
    runs: tuple[range, ...]

    @staticmethod
    def of(tensor: StoredTensor, part: Part, dtype: torch.dtype, file: WeightFile, offset: int) -> "FileRows":
        """Of a matrix that begins at `offset`. No part of its transpose."""
        first_column = part.columns_of(tensor.shape).start * dtype.itemsize
        row_bytes = tensor.shape[1] * dtype.itemsize
        return FileRows(file, dtype, offset + first_column, row_bytes, part.runs_of(tensor.shape))


def _within(wanted: range | None, size: int) -> range:
    if wanted is None:
        return range(size)
    assert wanted.step == 1, f"{wanted} has a step"
    assert 0 <= wanted.start <= wanted.stop <= size, f"{wanted} of a dimension of {size}"
    return wanted


class Checkpoint(Protocol):
    """Open model files. Opening reads headers, and an output matrix that may be a copy of the embedding.

    Attributes:
        files: The files that hold values, in a fixed order.
        tensors: By name, in the order in which reading is fastest.
        names: How these are named and laid out.
        encodings: Those that can be read.
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...
    @property
    def names(self) -> TensorNames: ...
    @property
    def encodings(self) -> Collection[str]: ...

    def rows(self, name: str, part: Part = WHOLE) -> FileRows | None:
        """Where the part of a matrix lies in its file; None where it does not lie there as plain values."""
        ...

    def read(self, name: str, dtype: torch.dtype, part: Part = WHOLE) -> torch.Tensor:
        """A tensor's values on the CPU, or a part of them: contiguous, in memory of its own.

        Takes memory for what it returns and a piece of some MiB, however large the tensor. Of a q or k projection, a
        part has all rows of some heads. Raises ConfigError where the file cannot give the values, or some are not
        finite.
        """
        ...


def check_finite(values: torch.Tensor, tensor: StoredTensor) -> None:
    """Raises ConfigError where some of a tensor's values are not finite."""
    # NaN is the least and the largest of any values among which it is; this reads them once.
    if values.numel() and not all(bound.isfinite() for bound in torch.aminmax(values)):
        raise not_finite(tensor, values.dtype)


def not_finite(tensor: StoredTensor, dtype: torch.dtype) -> ConfigError:
    """What to say of a tensor that, read as `dtype`, has values that are not finite."""
    if dtype == torch.float16 and tensor.encoding != "F16":
        return ConfigError(
            f"{tensor.file}: tensor {tensor.name} holds values that float16 cannot, or NaN: use --dtype bfloat16, or "
            "get the file anew"
        )
    return ConfigError(f"{tensor.file}: tensor {tensor.name} holds NaN or infinity: get the file anew")


def cut_short(tensor: StoredTensor) -> ConfigError:
    """What to say where a file ends within a tensor that it held."""
    return ConfigError(
        f"{tensor.file}: ends within tensor {tensor.name}, which it held whole a moment ago: get the file anew, and "
        "leave it alone while a model loads"
    )


def unreadable(tensor: StoredTensor, reason: str) -> ConfigError:
    """What to say where the system cannot give a tensor's bytes."""
    return ConfigError(
        f"{tensor.file}: tensor {tensor.name} cannot be read ({reason}): check the disk, or get the file anew"
    )
