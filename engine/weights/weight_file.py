"""Open files of weights: read at places, or mapped, and then computed with where they lie."""

import mmap
import os
import weakref
from pathlib import Path

import torch

from engine.weights.pages import open_to_read
from pdmesh.errors import UnavailableError


class WeightsChangedError(UnavailableError):
    """Somebody wrote to a file that a model computes with: the engine cannot go on."""


class WeightFile:
    """A file that is open for reading while this lives, and that others should leave alone.

    Raises ConfigError where it cannot be opened.

    Attributes:
        descriptor: Valid while this lives.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = open_to_read(path)
        weakref.finalize(self, os.close, self.descriptor)
        self._mapped: memoryview | None = None
        self._as_opened = self._size_and_time()

    @property
    def num_bytes(self) -> int:
        """That it holds now."""
        return self._size_and_time()[0]

    def read(self, offset: int, values: torch.Tensor) -> None:
        """Reads what lies from `offset` on into contiguous values. Raises OSError, EOFError where the file ends."""
        left = values.flatten().view(torch.uint8).numpy().data
        while left:
            if not (num_bytes := os.preadv(self.descriptor, [left], offset)):
                raise EOFError
            left, offset = left[num_bytes:], offset + num_bytes

    def mapped(self) -> memoryview:
        """All of it, for reading, without taking memory: pages come as they are used, and count as this process' then.

        Mapped as long as anybody has a part of it. Whoever reads where the file ended meanwhile ends the process.
        """
        if self._mapped is None:
            self._mapped = memoryview(mmap.mmap(self.descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ))
        return self._mapped

    def check_unchanged(self) -> None:
        """Raises WeightsChangedError where it was written to since it was opened; takes a microsecond.

        Replacing the file by another one of its name is no change: this one stays as it was.
        """
        if self._size_and_time() != self._as_opened:
            raise WeightsChangedError(
                f"{self.path}: was written to while a model computes with it: start the worker anew, and put new files "
                "in the place of old ones by renaming them (mv), as downloads do"
            )

    def _size_and_time(self) -> tuple[int, int]:
        state = os.fstat(self.descriptor)
        return state.st_size, state.st_mtime_ns
