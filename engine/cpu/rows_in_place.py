"""Matrices that the kernels read where they lie, row by row, in mapped files (kernels/rows.h)."""

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import as_strided

from engine.cpu.library import Kernels, PackStatus
from engine.weights.checkpoint import FileRows
from engine.weights.offload_file import address_of
from engine.weights.pages import release_pages
from engine.weights.stored import StoredMatrix
from engine.weights.weight_file import WeightFile


class MappedRows:
    """A matrix whose rows, of k values of what the kernels compute in, lie in a mapped file.

    Raises ConfigError where the file has become too short for it.

    Attributes:
        file: In which they lie; None when they were moved.
    """

    def __init__(self, stored: StoredMatrix, rows: FileRows, k: int) -> None:
        self._stored = stored
        self._row_bytes = rows.row_bytes
        self._k = k
        self._value_bytes = rows.dtype.itemsize
        end = rows.offset + (max(run.stop for run in rows.runs) - 1) * rows.row_bytes + k * rows.dtype.itemsize
        if rows.file.num_bytes < end:
            raise stored.cut_short()
        mapped = rows.file.mapped()
        offsets = [rows.offset + run.start * rows.row_bytes for run in rows.runs]
        first = address_of(mapped)
        # Of each run, where it begins and how many rows it has.
        self._runs = [(first + offset, len(run)) for offset, run in zip(offsets, rows.runs, strict=True)]
        self.file: WeightFile | None = rows.file

    @property
    def addresses(self) -> npt.NDArray[np.int64]:
        """Of its rows."""
        runs = [np.arange(begin, begin + num * self._row_bytes, self._row_bytes) for begin, num in self._runs]
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    @property
    def num_bytes(self) -> int:
        """Of the rows, side by side."""
        return sum(num_rows for _, num_rows in self._runs) * self._k * self._value_bytes

    def move(self, memory: memoryview) -> None:
        """Copies the rows, of which `num_bytes` then lie there, side by side, and no longer in the file."""
        assert self.file is not None
        to, width = np.frombuffer(memory, np.uint8).reshape(-1, self._k * self._value_bytes), self._row_bytes
        mapped, first = np.frombuffer(self.file.mapped(), np.uint8), 0
        base = mapped.ctypes.data
        for begin, num_rows in self._runs:
            lying = as_strided(mapped[begin - base :], (num_rows, to.shape[1]), (width, 1), writeable=False)
            to[first : first + num_rows] = lying
            first += num_rows
            release_pages(mapped[begin - base : begin - base + (num_rows - 1) * width + to.shape[1]])
        self._runs, self._row_bytes, self.file = [(to.ctypes.data, first)], to.shape[1], None

    def check(self, kernels: Kernels, num_threads: int) -> None:
        """Brings the rows into memory. Raises ConfigError where that cannot be, or they hold what is not finite."""
        for begin, num_rows in self._runs:
            match kernels.check_rows(begin, num_rows, self._row_bytes, self._k, num_threads):
                case PackStatus.PACKED:
                    pass
                case PackStatus.NOT_FINITE:
                    raise self._stored.not_finite()
                case error:
                    raise self._stored.unreadable(os.strerror(error))
        self._stored.done()


def rows_in_place(stored: StoredMatrix, dtype: torch.dtype) -> FileRows | None:
    """Where rows lie ready for kernels that compute in `dtype`; None where they must be packed."""
    rows = stored.rows()
    return rows if rows is not None and rows.dtype == dtype and rows.offset % dtype.itemsize == 0 else None


def address_rows(n: int, row_bytes: int, rows: Sequence[MappedRows], places: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the kernels take for a matrix of n outputs: int64, the address of each output's row.

    Args:
        row_bytes: That each row holds.
        places: Which outputs `rows` make. All others are zero: their row lies behind the addresses.
    """
    table = np.zeros(n + -(-row_bytes // 8), np.int64)
    table[:n] = table[n:].ctypes.data
    for of_matrix, outputs in zip(rows, places, strict=True):
        table[outputs.numpy()] = of_matrix.addresses
    return torch.from_numpy(table)
