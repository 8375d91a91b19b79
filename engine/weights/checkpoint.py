"""A checkpoint: a model's config and its tensors, whatever the file format."""

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
    """Which rows and columns of a stored tensor: None for all. Of a vector, `rows` says which values."""

    rows: range | None = None
    columns: range | None = None


WHOLE = Part()


def part_bytes(tensor: StoredTensor, part: Part) -> int:
    rows = len(part.rows) if part.rows is not None else tensor.shape[0]
    columns = len(part.columns) / tensor.shape[1] if part.columns is not None else 1
    return int(tensor.num_bytes * rows / tensor.shape[0] * columns)


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

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor's values on the CPU, in memory of its own. Raises ConfigError where the file cannot give them."""
        ...
