"""Packed matrices that wait in a file: they are packed in memory, written, and mapped where they lay."""

import ctypes
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np

from pdmesh.errors import ConfigError
from pdmesh.kv_memory import private_memory

_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t) + (ctypes.c_int,) * 3 + (ctypes.c_int64,)
_libc.mmap.restype = ctypes.c_void_p


class OffloadFile:
    """A file that ends with this process, however that ends: it has no name.

    Args:
        directory: Where it takes disk space.

    Raises ConfigError where it cannot be made, or `num_bytes` are more than there is room for.
    """

    def __init__(self, directory: Path, num_bytes: int) -> None:
        self._directory = directory
        try:
            state = os.statvfs(directory)
            free = state.f_bavail * state.f_frsize
            if num_bytes > free:
                raise ConfigError(
                    f"{directory}: weights of {num_bytes / 2**30:.2f} GiB are to wait there, and {free / 2**30:.2f} "
                    "GiB are free: free some, or name another directory with --offload-dir"
                )
            self._descriptor, name = tempfile.mkstemp(dir=directory)
            os.unlink(name)
        except OSError as error:
            raise self._failed(error) from error
        # What is mapped outlives it.
        weakref.finalize(self, os.close, self._descriptor)
        self._num_bytes = 0

    def map_over(self, memory: memoryview) -> None:
        """Moves the bytes of whole pages of private memory into the file, and the pages of the file into their place.

        From then on they can be read alone. Raises ConfigError.
        """
        begin = self._num_bytes
        try:
            written = 0
            while written < len(memory):
                written += os.pwrite(self._descriptor, memory[written:], begin + written)
        except OSError as error:
            raise self._failed(error) from error
        self._num_bytes += len(memory)
        address, prot = address_of(memory), mmap.PROT_READ
        mapped = _libc.mmap(address, len(memory), prot, mmap.MAP_SHARED | _MAP_FIXED, self._descriptor, begin)
        if mapped != address:
            raise self._failed(OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())))

    def _failed(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self._directory}: weights cannot wait there ({error.strerror}): name a directory with room with "
            "--offload-dir"
        )


class FileMemory:
    """Memory for what is packed now, and waits in a file from `store` on."""

    def __init__(self, file: OffloadFile) -> None:
        self._file = file
        self._pieces: list[memoryview] = []

    def take(self, num_bytes: int) -> memoryview:
        """Zeroed, in whole pages."""
        memory = private_memory(-(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._pieces.append(memory)
        return memory[:num_bytes]

    def store(self) -> None:
        """Moves what was taken into the file, for reading alone from then on. Raises ConfigError."""
        for piece in self._pieces:
            self._file.map_over(piece)

    @property
    def pieces(self) -> tuple[memoryview, ...]:
        """What was taken, in whole pages."""
        return tuple(self._pieces)


def address_of(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)
