"""Memory of this machine for KV blocks, private to this process or lent to others."""

import fcntl
import mmap
import os
import weakref

from pdmesh.types import MemoryFile

# From linux/fcntl.h; Python names it from 3.15 on.
_F_SEAL_FUTURE_WRITE = 0x0010


def private_memory(num_bytes: int) -> memoryview:
    """Zeroed memory. What is never written costs nothing. Raises OSError where it cannot be had.

    In pages of 2 MiB where the system has them: fewer of them to look up, and to be given.
    """
    # Python's default is memory that children share, for which systems have large pages more seldom.
    return _in_large_pages(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def shared_memory(num_bytes: int) -> tuple[memoryview, MemoryFile | None]:
    """As `private_memory`, in a file that other processes may be lent to read, never to write; Linux only, else None.

    The file ends with the last process that has it open: nothing is left behind, however this one ends. Its descriptor
    is closed with the memory.
    """
    if not hasattr(os, "memfd_create"):
        return private_memory(num_bytes), None
    descriptor = memory_file()
    try:
        memory = map_shared(descriptor, num_bytes)
        seal(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    weakref.finalize(memory.obj, os.close, descriptor)
    return memory, MemoryFile(descriptor, num_bytes)


def memory_file() -> int:
    """The descriptor of a new, empty file that is nothing but memory, for `map_shared`; Linux only.

    Whoever calls closes it. It is inherited by no process that is not given it.
    """
    return os.memfd_create("pdmesh-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def map_shared(descriptor: int, num_bytes: int) -> memoryview:
    """The memory of a `memory_file`, zeroed at first, writable by every process that maps it before it is sealed.

    All give the same size: the first to come makes it so, in whatever order they come. The mapping outlives the
    descriptor. Raises OSError where the memory cannot be had, PermissionError of a file that is sealed.
    """
    os.ftruncate(descriptor, num_bytes)
    return _in_large_pages(mmap.mmap(descriptor, num_bytes))


def seal(descriptor: int) -> None:
    """Ends writing to a `memory_file`, but for those who have mapped it: it keeps its size, and later mappings read."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE)


def _in_large_pages(memory: mmap.mmap) -> memoryview:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
