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
    return _in_large_pages(mmap.mmap(-1, num_bytes))


def shared_memory(num_bytes: int) -> tuple[memoryview, MemoryFile | None]:
    """As `private_memory`, in a file that other processes may be lent to read, never to write; Linux only, else None.

    The file ends with the last process that has it open: nothing is left behind, however this one ends. Its descriptor
    is closed with the memory.
    """
    if not hasattr(os, "memfd_create"):
        return private_memory(num_bytes), None
    descriptor = os.memfd_create("pdmesh-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        memory = mmap.mmap(descriptor, num_bytes)
        # Our own mapping stays writable; from now on no other can be.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE)
    except OSError:
        os.close(descriptor)
        raise
    weakref.finalize(memory, os.close, descriptor)
    return _in_large_pages(memory), MemoryFile(descriptor, num_bytes)


def _in_large_pages(memory: mmap.mmap) -> memoryview:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
