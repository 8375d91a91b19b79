"""KV blocks of ranks that compute on devices, staged in the memory which the ranks of a node share.

Each rank copies its own region of a block between its device and that memory, when the leader says so; on CPUs the
cache lies there itself, and nothing of this is needed.
"""

import threading
from collections.abc import Sequence

from engine.kv_cache import KVCache
from engine.parallel.wire import Stage, Staged, Wire
from pdmesh.types import MemoryFile


class StagedMemory:
    """Implements BlockMemory over all ranks of the leader's node. Any thread may call; a copy waits for the step.

    Args:
        own: The leader's region.
        followers: The other ranks of this node.
    """

    def __init__(self, own: KVCache, followers: Sequence[Wire]) -> None:
        self._own = own
        self._followers = followers
        # One at a time: answers name nothing.
        self._staging = threading.Lock()

    @property
    def block_bytes(self) -> int:
        return self._own.block_bytes

    @property
    def file(self) -> MemoryFile | None:
        return self._own.file

    def place(self, block_id: int) -> int:
        return self._own.place(block_id)

    def view(self, block_id: int) -> memoryview:
        return self._own.view(block_id)

    def to_host(self, block_ids: Sequence[int]) -> None:
        self._stage(block_ids, to_host=True)

    def to_device(self, block_ids: Sequence[int]) -> None:
        self._stage(block_ids, to_host=False)

    def _stage(self, block_ids: Sequence[int], *, to_host: bool) -> None:
        """Raises GroupDownError where a rank is lost."""
        if not block_ids:
            return
        with self._staging:
            for wire in self._followers:
                wire.send(Stage(tuple(block_ids), to_host))
            copy_region(self._own, Stage(tuple(block_ids), to_host))
            for wire in self._followers:
                answer = wire.receive()
                assert isinstance(answer, Staged), f"{wire.peer} answered {answer}"


def copy_region(kv_cache: KVCache, stage: Stage) -> None:
    """What each rank does of it."""
    (kv_cache.to_host if stage.to_host else kv_cache.to_device)(stage.block_ids)
