"""Matrices that the kernels read where they lie, row by row, in mapped files (kernels/rows.h)."""

import mmap
import os
from collections.abc import Sequence

import torch

from engine.cpu.library import Kernels, PackStatus
from engine.weights.checkpoint import FileRows
from engine.weights.offload_file import address_of
from engine.weights.stored import StoredMatrix


class MappedRows:
    """A matrix whose rows, of k values of what the kernels compute in, lie in a mapped file.

    Raises ConfigError where the file has become too short for it.

    Attributes:
        pages: In which the rows lie: memory that begins with a page.
    """

    def __init__(self, stored: StoredMatrix, rows: FileRows, k: int) -> None:
        self._stored = stored
        self._row_bytes = rows.row_bytes
        self._k = k
        end = rows.offset + (max(run.stop for run in rows.runs) - 1) * rows.row_bytes + k * rows.dtype.itemsize
        if rows.file.num_bytes < end:
            raise stored.cut_short()
        mapped = rows.file.mapped()
        offsets = [rows.offset + run.start * rows.row_bytes for run in rows.runs]
        first = address_of(mapped)
        # Of each run, where it begins and how many rows it has.
        self._runs = [(first + offset, len(run)) for offset, run in zip(offsets, rows.runs, strict=True)]
        self.file = rows.file
        self.pages = [
            mapped[offset // mmap.PAGESIZE * mmap.PAGESIZE : offset + len(run) * rows.row_bytes]
            for offset, run in zip(offsets, rows.runs, strict=True)
        ]

    @property
    def addresses(self) -> torch.Tensor:
        """Of its rows, int64."""
        runs = [torch.arange(begin, begin + num * self._row_bytes, self._row_bytes) for begin, num in self._runs]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

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
    table = torch.zeros(n + -(-row_bytes // 8), dtype=torch.int64)
    table[:n] = table[n:].data_ptr()
    for of_matrix, outputs in zip(rows, places, strict=True):
        table[outputs] = of_matrix.addresses
    return table
