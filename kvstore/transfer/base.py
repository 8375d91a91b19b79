"""Moving KV blocks between workers: the words and the seams.

A receiver that has reserved blocks issues a ticket for exactly these; the `Grant` that carries it travels over gRPC.
The sender opens a `KVSender` with it and sends blocks as they become ready. Blocks are counted from the first one that
the ticket covers: a sender never learns where they lie in the receiver's memory.

    receiver:  ReceiverHub.offers -> what a sender chooses from
               ReceiverHub.expect(…) -> IncomingTransfer: wait(), aclose()
    sender:    KVSenders.negotiate(offers) -> Negotiation
               KVSenders.sender(grant, …) -> KVSender: open(), send(…) …, finish(), aclose()

A transport is a module with a receiving and a sending end; docs/transfer.md says how to add one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import google_crc32c
import numpy as np

from pdmesh.hashing import BlockHash
from pdmesh.types import BlockRun, MemoryFile


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What one transfer moved.

    The sender's duration runs from the opening to the last acknowledgement, the receiver's from the grant to the end.
    """

    num_bytes: int
    num_parts: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Grant:
    """Leave to write certain blocks, once.

    Attributes:
        ticket: 16 random bytes.
        epoch: Of the attempt that it belongs to.
        transport: Over which the blocks are awaited.
        address: Where that transport listens, host:port.
    """

    ticket: bytes
    epoch: int
    transport: str
    address: str


@dataclass(frozen=True, slots=True)
class TransportOffer:
    """A transport on which a receiver can be reached, and where."""

    name: str
    address: str


class BlockMemory(Protocol):
    """The bytes of KV blocks; an engine's memory has this shape."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def file(self) -> MemoryFile | None:
        """Where the blocks lie for other processes of this host to read; None: nowhere."""
        ...

    def place(self, block_id: int) -> int:
        """Where in `file` a block begins, in bytes."""
        ...

    def view(self, block_id: int) -> memoryview:
        """The writable bytes of one block, `block_bytes` long."""
        ...

    def to_host(self, block_ids: Sequence[int]) -> None:
        """Before views are read."""
        ...

    def to_device(self, block_ids: Sequence[int]) -> None:
        """After views were written, before the blocks are used."""
        ...


class SlicedMemory:
    """Implements BlockMemory: of each block of `memory`, one run of bytes."""

    def __init__(self, memory: BlockMemory, run: BlockRun) -> None:
        assert 0 <= run.offset_bytes < run.end_bytes <= memory.block_bytes, f"{run} of {memory.block_bytes} bytes"
        self._memory = memory
        self._run = run

    @property
    def block_bytes(self) -> int:
        return self._run.num_bytes

    @property
    def file(self) -> MemoryFile | None:
        return self._memory.file

    def place(self, block_id: int) -> int:
        return self._memory.place(block_id) + self._run.offset_bytes

    def view(self, block_id: int) -> memoryview:
        return self._memory.view(block_id)[self._run.offset_bytes : self._run.end_bytes]

    def to_host(self, block_ids: Sequence[int]) -> None:
        self._memory.to_host(block_ids)

    def to_device(self, block_ids: Sequence[int]) -> None:
        self._memory.to_device(block_ids)


class KVSender(Protocol):
    """One transfer, on the side that has the blocks. Not reusable; `aclose` in any case.

    Every method raises MeshError: TicketError or CorruptionError as the receiver said it, UnavailableError where the
    receiver was lost.
    """

    async def open(self) -> None:
        """Presents the ticket."""
        ...

    async def send(self, first_index: int, block_ids: Sequence[int], block_hashes: Sequence[BlockHash]) -> None:
        """Sends blocks whose place in the ticket begins at `first_index`, with the identity of each.

        Their bytes must stay until `aclose`.
        """
        ...

    async def finish(self) -> TransferStats:
        """Returns when the receiver has verified every byte that the ticket covers."""
        ...

    async def aclose(self) -> None:
        """Aborts what is not finished. After it, nobody reads the blocks any more. Idempotent."""
        ...


class KVReceiver(Protocol):
    """One transport's listening end, on the side that reserves the blocks."""

    @property
    def address(self) -> str:
        """Where senders reach it, once started."""
        ...

    async def start(self) -> None: ...

    async def aclose(self) -> None:
        """Ends every transfer and returns when none can write any more."""
        ...


def crc32c(pieces: Sequence[memoryview | bytes], crc: int = 0) -> int:
    """CRC32C (Castagnoli) of the pieces laid end to end, read in place; goes on from the `crc` of what came before."""
    for piece in pieces:
        # google_crc32c takes read-only buffers alone; a read-only array over the same memory is one.
        crc = google_crc32c.extend(crc, np.frombuffer(memoryview(piece).toreadonly(), np.uint8))
    return crc
