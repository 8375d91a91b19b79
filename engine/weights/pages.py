"""Files of weights that are read at places; pages of mapped ones, which count as memory until they are let go."""

import ctypes
import mmap
import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pdmesh.errors import ConfigError

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def open_to_read(path: Path) -> int:
    """A descriptor of a regular file, which the caller closes. Raises ConfigError."""
    try:
        # A pipe would have this wait for whoever writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path}: is no regular file: name the right one, or get it anew")
    return descriptor


def release_pages(mapped: npt.NDArray[np.uint8]) -> None:
    """Lets go of the pages that lie wholly in these contiguous bytes of a mapped file, which nobody may have written.

    The system's cache keeps them, and whoever reads the bytes again finds them as they were. Without this, a process
    that reads half of each row has the whole file in memory (`VmHWM`), row by row.
    """
    begin, end = mapped.ctypes.data, mapped.ctypes.data + mapped.size
    # Inwards: what lies beside may be somebody else's.
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        # Where the system refuses, the pages stay until it wants them: nothing depends on it.
        _libc.madvise(begin, end - begin, mmap.MADV_DONTNEED)
