"""KV blocks without an engine."""

import mmap
from collections.abc import Sequence

from pdmesh.kv_memory import private_memory, shared_memory
from pdmesh.types import MemoryFile


class PlainMemory:
    """Implements BlockMemory over pages of this process, all of them written once, as a worker's in use are.

    With `lend`, they are a prefill worker's, which others may be lent; else a decode worker's.
    """

    def __init__(self, num_blocks: int, block_bytes: int, *, lend: bool) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.file: MemoryFile | None = None
        if lend:
            self.bytes, self.file = shared_memory(num_blocks * block_bytes)
        else:
            self.bytes = private_memory(num_blocks * block_bytes)
        for start in range(0, len(self.bytes), mmap.PAGESIZE):
            self.bytes[start] = start % 251

    def place(self, block_id: int) -> int:
        return block_id * self.block_bytes

    def view(self, block_id: int) -> memoryview:
        return self.bytes[block_id * self.block_bytes :][: self.block_bytes]

    def to_host(self, block_ids: Sequence[int]) -> None:
        """Nothing to do: these are the host's bytes."""

    def to_device(self, block_ids: Sequence[int]) -> None:
        """Nothing to do: these are the host's bytes."""
