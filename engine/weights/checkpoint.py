"""A checkpoint: a model's config and its tensors, whatever the file format."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from engine.model_config import ModelConfig


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

    def read(self, name: str, dtype: torch.dtype, part: Part = WHOLE) -> torch.Tensor:
        """A tensor's values on the CPU, or a part of them: contiguous, in memory of its own.

        Takes memory for what it returns and a piece of some MiB, however large the tensor. Of a q or k projection, a
        part has all rows of some heads. Raises ConfigError where the file cannot give the values.
        """
        ...
