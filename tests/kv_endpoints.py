"""Both ends of KV transfers for tests: memory of plain bytes, a receiver, a sender."""

import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry

from kvstore.transfer.base import Grant, KVSender
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.receiver import IncomingTransfer, ReceiverHub
from kvstore.transfer.senders import KVSenders
from pdmesh.channels import ChannelPool
from pdmesh.hashing import BlockHash
from pdmesh.kv_memory import shared_memory
from pdmesh.server import GrpcServer

REQUEST_ID = "request"
EPOCH = 3
SENDER_ID = "prefill-0"
INCARNATION = "sender-1"
THREAD_END_TIMEOUT_S = 2.0


def hash_of(place: int) -> BlockHash:
    """Identity of the block at this place of a ticket."""
    return BlockHash(b"block" + place.to_bytes(11, "little"))


def hashes(num_blocks: int, first: int = 0) -> list[BlockHash]:
    return [hash_of(place) for place in range(first, first + num_blocks)]


def new_journal() -> TransferJournal:
    return TransferJournal(CollectorRegistry())


class BytesMemory:
    """Block memory without an engine, lent to others of this host; random bytes with a seed, else zeros."""

    def __init__(self, num_blocks: int, block_bytes: int, seed: int | None = None) -> None:
        self.block_bytes = block_bytes
        self._bytes, self.file = shared_memory(max(1, num_blocks * block_bytes))
        if seed is not None:
            self._bytes[:] = random.Random(seed).randbytes(len(self._bytes))

    @property
    def content(self) -> bytes:
        return bytes(self._bytes)

    def place(self, block_id: int) -> int:
        return block_id * self.block_bytes

    def view(self, block_id: int) -> memoryview:
        return self._bytes[block_id * self.block_bytes :][: self.block_bytes]

    def read(self, block_ids: Sequence[int]) -> bytes:
        return b"".join(bytes(self.view(block_id)) for block_id in block_ids)

    def fill(self, block_ids: Sequence[int], value: int) -> None:
        for block_id in block_ids:
            self.view(block_id)[:] = bytes([value]) * self.block_bytes

    def to_host(self, block_ids: Sequence[int]) -> None:
        """Nothing to do: these are the host's bytes."""

    def to_device(self, block_ids: Sequence[int]) -> None:
        """Nothing to do: these are the host's bytes."""


@dataclass(eq=False)
class Endpoints:
    """A receiving worker's transfer service, and a sending one's, on one transport."""

    transport: str
    source: BytesMemory
    target: BytesMemory
    hub: ReceiverHub
    server: GrpcServer
    senders: KVSenders

    @property
    def address(self) -> str:
        """Where the receiver listens."""
        return self.hub.offers[0].address

    def expect(self, block_ids: Sequence[int], request_id: str = REQUEST_ID) -> IncomingTransfer:
        block_hashes = hashes(len(block_ids))
        return self.hub.expect(request_id, EPOCH, SENDER_ID, INCARNATION, block_ids, block_hashes, self.transport)

    def sender(self, grant: Grant, via: str | None = None, request_id: str = REQUEST_ID) -> KVSender:
        """A sender for `grant`, through a proxy's address if given."""
        return self.senders.sender(grant if via is None else replace(grant, address=via), request_id)

    async def stop_receiving(self) -> None:
        await self.hub.aclose()
        await self.server.stop()


@asynccontextmanager
async def endpoints(transport: str, num_blocks: int, block_bytes: int) -> AsyncIterator[Endpoints]:
    """Both ends, started; afterwards nothing is left of them, no ticket and no thread."""
    source, target = BytesMemory(num_blocks, block_bytes, seed=1), BytesMemory(num_blocks, block_bytes)
    server = GrpcServer("127.0.0.1", 0)
    hub = ReceiverHub(target, [transport], server, "127.0.0.1", "127.0.0.1", new_journal())
    channels = ChannelPool()
    senders = KVSenders(source, INCARNATION, channels.get, new_journal())
    ends = Endpoints(transport, source, target, hub, server, senders)
    try:
        await server.start()
        await hub.start()
        yield ends
    finally:
        await senders.aclose()
        await channels.aclose()
        await ends.stop_receiving()
    assert hub.num_open_tickets == 0
    for thread in threading.enumerate():
        if thread.name.startswith("kv-"):
            # One that has let go of everything may still be on its way out.
            thread.join(THREAD_END_TIMEOUT_S)
            assert not thread.is_alive(), f"{thread.name} was left running"
