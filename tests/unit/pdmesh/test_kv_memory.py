"""Memory that may be lent: others read it, cannot write it or cut it short, and nothing of it is left."""

import gc
import mmap
import os
import subprocess
import sys

import pytest

from pdmesh.kv_memory import map_shared, memory_file, private_memory, seal, shared_memory

# Maps the file whose descriptor it is given, waits for a line, and writes.
_WRITER = """
import sys
from pdmesh.kv_memory import map_shared
memory = map_shared(int(sys.argv[1]), 10_000)
print("mapped", flush=True)
sys.stdin.readline()
memory[:3] = b"abc"
"""

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


@linux_only
def test_processes_that_mapped_a_file_before_it_was_sealed_write_it_and_others_do_not() -> None:
    descriptor = memory_file()
    try:
        command = [sys.executable, "-c", _WRITER, str(descriptor)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, pass_fds=[descriptor], stdin=pipe, stdout=pipe, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "mapped\n"
            memory = map_shared(descriptor, 10_000)
            seal(descriptor)
            writer.communicate("write\n", timeout=60)
        assert writer.returncode == 0
        assert bytes(memory[:3]) == b"abc"
        memory[3:6] = b"xyz"
        assert mmap.mmap(descriptor, 10_000, prot=mmap.PROT_READ)[:6] == b"abcxyz"
        with pytest.raises(PermissionError):
            map_shared(descriptor, 10_000)
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"no", 0)
        for num_bytes in (9_000, 11_000):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, num_bytes)
    finally:
        os.close(descriptor)


@linux_only
def test_the_memory_outlives_the_descriptor_that_it_was_mapped_by() -> None:
    descriptor = memory_file()
    memory = map_shared(descriptor, 4096)
    os.close(descriptor)
    memory[4095] = 1
    assert memory[4095] == 1
