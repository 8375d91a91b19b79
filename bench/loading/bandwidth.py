"""How fast a directory's disk, and the system's cache of it, can be read."""

import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_FILE_BYTES = 1 << 30
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second, of one thread that reads large pieces.

    Attributes:
        direct: Past the cache; None where the file system does not offer it.
        cached: Of a file that is in the cache.
    """

    direct: float | None
    cached: float


def measure_bandwidth(directory: Path) -> Bandwidth:
    """Writes a file of 1 GiB that has no name, and reads it."""
    descriptor, name = tempfile.mkstemp(dir=directory)
    try:
        piece = mmap.mmap(-1, _PIECE_BYTES)
        piece.write(os.urandom(_PIECE_BYTES))
        for offset in range(0, _FILE_BYTES, _PIECE_BYTES):
            os.pwrite(descriptor, piece, offset)
        os.fsync(descriptor)
        cached = max(_speed(descriptor, piece) for _ in range(3))
        try:
            past_cache = os.open(name, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return Bandwidth(None, cached)
        try:
            return Bandwidth(_speed(past_cache, piece), cached)
        finally:
            os.close(past_cache)
    finally:
        os.unlink(name)
        os.close(descriptor)


def _speed(descriptor: int, piece: mmap.mmap) -> float:
    began = time.monotonic()
    for offset in range(0, _FILE_BYTES, _PIECE_BYTES):
        os.preadv(descriptor, [piece], offset)
    return _FILE_BYTES / (time.monotonic() - began)
