"""Where blocks that others fetch are taken from."""

from collections.abc import Sequence
from typing import Protocol

from kvstore.transfer.base import BlockMemory
from pdmesh.hashing import BlockHash
from pdmesh.types import PairingFacts


class HeldBlocks(Protocol):
    """Blocks that keep their bytes until `aclose`."""

    @property
    def block_ids(self) -> Sequence[int]:
        """In the shelf's memory, in the order asked for."""
        ...

    async def aclose(self) -> None: ...


class Shelf(Protocol):
    """A worker's engine and tiers, or a store's tiers."""

    @property
    def facts(self) -> PairingFacts | None:
        """Of which model the blocks are; None while there are none."""
        ...

    @property
    def memory(self) -> BlockMemory: ...

    async def hold(self, hashes: Sequence[BlockHash]) -> HeldBlocks:
        """The longest run that begins `hashes`."""
        ...
