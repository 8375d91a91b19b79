"""Weights that wait in a file come into memory ahead of need, while the layers before compute, and are let go after."""

import ctypes
import errno
import os
import threading
import weakref
from collections.abc import Sequence

from engine.placement import AHEAD
from engine.weights.offload_file import address_of

# From linux/mman.h; Python names the last one nowhere.
_MADV_WILLNEED = 3
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22

# Calls leave the interpreter free.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class PagesAhead:
    """Units of weights, mapped from a file, that are used in turn: at most `AHEAD + 1` are in memory.

    Args:
        units: Of each, the memory in which it lies.
    """

    def __init__(self, units: Sequence[Sequence[memoryview]]) -> None:
        self._window = _Window(units)
        threading.Thread(target=self._window.run, name="pages-ahead", daemon=True).start()
        weakref.finalize(self, self._window.stop)

    def enter(self, unit: int) -> None:
        """Waits until a unit is in memory, and has those that follow it read. The one used before may go.

        Raises OSError where the file cannot be read.
        """
        self._window.enter(unit)


class _Window:
    """What the thread and those that wait for it share. Whoever owns a `PagesAhead` does not own this."""

    def __init__(self, units: Sequence[Sequence[memoryview]]) -> None:
        self._pieces = [[(address_of(piece), len(piece)) for piece in unit] for unit in units]
        # Mapped while the thread runs.
        self._units = units
        self._current = 0
        self._present: set[int] = set()
        self._failed: OSError | None = None
        self._stopped = False
        self._changed = threading.Condition()

    def enter(self, unit: int) -> None:
        with self._changed:
            if unit != self._current:
                self._current = unit
                self._changed.notify_all()
            self._changed.wait_for(lambda: unit in self._present or self._failed is not None)
            if self._failed is not None:
                raise self._failed

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._next() is not None)
                if self._stopped:
                    return
                unit, leaving = self._next(), self._present - set(self._wanted())
                assert unit is not None
                self._present -= leaving
            for gone in leaving:
                self._advise(gone, _MADV_DONTNEED)
            try:
                self._bring(unit)
            except OSError as error:
                with self._changed:
                    self._failed = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._present.add(unit)
                self._changed.notify_all()

    def _wanted(self) -> list[int]:
        return [(self._current + ahead) % len(self._pieces) for ahead in range(AHEAD + 1)]

    def _next(self) -> int | None:
        """The unit to read now."""
        return next((unit for unit in self._wanted() if unit not in self._present), None)

    def _bring(self, unit: int) -> None:
        # First all that the disk is asked for, which it then reads side by side.
        self._advise(unit, _MADV_WILLNEED)
        if not self._advise(unit, _MADV_POPULATE_READ):
            error = ctypes.get_errno()
            if error != errno.EINVAL:
                raise OSError(error, f"weights that wait on disk cannot be read ({os.strerror(error)})")
            # Linux before 5.14 knows no such advice: pages come as they are used.

    def _advise(self, unit: int, advice: int) -> bool:
        return all(_libc.madvise(address, size, advice) == 0 for address, size in self._pieces[unit])
