"""Memory that may be lent: others read it, cannot write it or cut it short, and nothing of it is left."""

import gc
import mmap
import os
import sys

import pytest

from pdmesh.kv_memory import private_memory, shared_memory

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")


def test_private_memory_is_zeroed_and_writable() -> None:
    memory = private_memory(10_000)
    assert bytes(memory) == bytes(10_000)
    memory[9_999] = 1


@linux_only
def test_what_is_lent_can_be_read_and_neither_written_nor_cut_short() -> None:
    memory, file = shared_memory(10_000)
    assert file is not None
    memory[:3] = b"abc"
    lent = mmap.mmap(file.descriptor, file.num_bytes, prot=mmap.PROT_READ)
    assert lent[:3] == b"abc"
    memory[:3] = b"xyz"
    assert lent[:3] == b"xyz"
    with pytest.raises(PermissionError):
        mmap.mmap(file.descriptor, file.num_bytes)
    with pytest.raises(PermissionError):
        os.ftruncate(file.descriptor, 0)


@linux_only
def test_the_descriptor_is_closed_with_the_memory() -> None:
    memory, file = shared_memory(4096)
    assert file is not None
    os.fstat(file.descriptor)
    del memory
    gc.collect()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(file.descriptor)
