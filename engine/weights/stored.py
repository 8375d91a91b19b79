"""Matrices that are still in their checkpoint: whoever computes with them in an order of their own reads them there."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.weights.checkpoint import Checkpoint, FileRows, Part, StoredTensor, not_finite, part_bytes
from pdmesh.errors import ConfigError


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

    def done(self) -> None:
        """Says that the values were read."""
        self.progress.add(part_bytes(self.tensor, self.part))

    def not_finite(self) -> ConfigError:
        return not_finite(self.tensor, self.dtype)

    def cut_short(self) -> ConfigError:
        return ConfigError(
            f"{self.tensor.file}: ends within tensor {self.tensor.name}, which it held whole a moment ago: "
            "get the file anew, and leave it alone while a model loads"
        )

    def unreadable(self, reason: str) -> ConfigError:
        return ConfigError(
            f"{self.tensor.file}: tensor {self.tensor.name} cannot be read ({reason}): check the disk, or get the "
            "file anew"
        )
