"""The block memory of an engine that may not have loaded yet: servers are wired before weights are read."""

from collections.abc import Sequence

from engine.api import Engine
from pdmesh.types import MemoryFile


class EngineMemory:
    """`engine.memory`, looked up at each use."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def block_bytes(self) -> int:
        return self._engine.memory.block_bytes

    @property
    def file(self) -> MemoryFile | None:
        return self._engine.memory.file

    def place(self, block_id: int) -> int:
        return self._engine.memory.place(block_id)

    def view(self, block_id: int) -> memoryview:
        return self._engine.memory.view(block_id)

    def to_host(self, block_ids: Sequence[int]) -> None:
        self._engine.memory.to_host(block_ids)

    def to_device(self, block_ids: Sequence[int]) -> None:
        self._engine.memory.to_device(block_ids)
