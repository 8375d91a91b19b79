"""A checkpoint: a model's config and its tensors, whatever the file format."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from engine.model_config import ModelConfig
from pdmesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a file.

    Attributes:
        name: As in a Hugging Face checkpoint, e.g. "model.layers.0.self_attn.q_proj.weight".
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
    """

    rows: range | None = None
    columns: range | None = None

    def rows_of(self, shape: tuple[int, ...]) -> range:
        """The rows, of a tensor of this shape with one dimension or more."""
        return _within(self.rows, shape[0])

    def columns_of(self, shape: tuple[int, ...]) -> range:
        """The columns, of a matrix of this shape."""
        assert len(shape) == 2, f"only a matrix has columns, not a tensor of shape {shape}"
        return _within(self.columns, shape[1])

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What shape the part of a tensor of this shape has."""
        if self.columns is not None:
            return (len(self.rows_of(shape)), len(self.columns_of(shape)))
        return shape if self.rows is None else (len(self.rows_of(shape)), *shape[1:])


WHOLE = Part()


def part_bytes(tensor: StoredTensor, part: Part) -> int:
    """What a part takes in the file: its share of `tensor.num_bytes`, rounded down where it cuts through a block."""
    num_values = math.prod(tensor.shape)
    return tensor.num_bytes * math.prod(part.shape_of(tensor.shape)) // num_values if num_values else 0


@dataclass(frozen=True, slots=True)
class FileRows:
    """Rows of a matrix, or of a part of one, as they lie in an open file: plain values in the machine's byte order.

    Attributes:
        descriptor: Of the file; valid while the checkpoint lives.
        offset: Of the first value, in bytes.
        row_bytes: From one row's first value to the next one's.
    """

    descriptor: int
    dtype: torch.dtype
    offset: int
    row_bytes: int


def _within(wanted: range | None, size: int) -> range:
    if wanted is None:
        return range(size)
    assert wanted.step == 1, f"{wanted} has a step"
    assert 0 <= wanted.start <= wanted.stop <= size, f"{wanted} of a dimension of {size}"
    return wanted


class Checkpoint(Protocol):
    """Open model files. Opening read only headers; `read` reads values.

    Attributes:
        files: The files that hold values, in a fixed order.
        tensors: By name, in the order in which reading is fastest.
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

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
