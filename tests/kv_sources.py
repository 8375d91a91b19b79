"""A process that others fetch KV from, as it should be and as it should not."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from kvstore.exchange.servicer import SERVICE, FetchServicer
from kvstore.transfer.base import BlockMemory, Grant, KVSender
from kvstore.transfer.senders import KVSenders
from pdmesh.channels import ChannelPool
from pdmesh.hashing import BlockHash
from pdmesh.server import GrpcServer
from pdmesh.types import KVSource, PairingFacts
from pdmesh.v1 import kv_blocks_pb2 as pb
from pdmesh.v1 import kv_blocks_pb2_grpc
from pdmesh.v1 import kv_transfer_pb2 as kv_pb
from tests.fault_proxy import FaultProxy
from tests.kv_endpoints import BytesMemory, new_journal

SOURCE_ID = "source"
INCARNATION = "source-1"


class BytesShelf:
    """Implements Shelf: has `num_blocks` of whatever run is asked for, their bytes being nobody's KV.

    Attributes:
        holding: Set once somebody holds blocks.
        num_held: Holders now.
    """

    def __init__(self, facts: PairingFacts, block_bytes: int, num_blocks: int) -> None:
        self.facts = facts
        self.memory = BytesMemory(max(1, num_blocks), block_bytes, seed=7)
        self.holding = asyncio.Event()
        self.num_held = 0
        self._num_blocks = num_blocks

    async def hold(self, hashes: Sequence[BlockHash]) -> "_Held":
        self.holding.set()
        self.num_held += 1
        return _Held(self, range(min(self._num_blocks, len(hashes))))


@dataclass
class _Held:
    shelf: BytesShelf
    block_ids: Sequence[int]

    async def aclose(self) -> None:
        self.shelf.num_held -= 1


class ProxiedSenders(KVSenders):
    """Sends through a proxy, if it has one, in place of the address granted."""

    proxy: FaultProxy | None = None

    def sender(self, grant: Grant, request_id: str, memory: BlockMemory | None = None) -> KVSender:
        if self.proxy is not None:
            grant = replace(grant, address=self.proxy.address)
        return super().sender(grant, request_id, memory)


@dataclass
class Source:
    """A source that runs; `kv` is what a router would say of it."""

    shelf: BytesShelf
    senders: ProxiedSenders
    server: GrpcServer

    @property
    def kv(self) -> KVSource:
        return KVSource(SOURCE_ID, INCARNATION, self.server.address, 1000)


class _Promising(kv_blocks_pb2_grpc.KVBlocksServicer):
    """Says that it has blocks, gives signs of life, and sends nothing."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks

    async def Fetch(
        self, request_iterator: AsyncIterator[pb.FetchRequest], context: object
    ) -> AsyncIterator[pb.FetchResponse]:
        offers = (await anext(aiter(request_iterator))).start.offers
        transports = [offer.name for offer in offers]
        yield pb.FetchResponse(
            found=pb.FetchFound(num_blocks=self._num_blocks, incarnation=INCARNATION, transports=transports)
        )
        while True:
            await asyncio.sleep(0.05)
            yield pb.FetchResponse(heartbeat=kv_pb.Heartbeat())


@asynccontextmanager
async def source(
    facts: PairingFacts, block_bytes: int, num_blocks: int, transports: Sequence[str] = ("tcp", "grpc"), port: int = 0
) -> AsyncIterator[Source]:
    """One that sends what it says, in form at least."""
    shelf = BytesShelf(facts, block_bytes, num_blocks)
    channels = ChannelPool()
    senders = ProxiedSenders(shelf.memory, INCARNATION, channels.get, new_journal(), transports)
    server = GrpcServer("127.0.0.1", port)
    server.add(kv_blocks_pb2_grpc.add_KVBlocksServicer_to_server, FetchServicer(shelf, INCARNATION, senders), SERVICE)
    try:
        await server.start()
        yield Source(shelf, senders, server)
    finally:
        await server.stop()
        await senders.aclose()
        await channels.aclose()
    # A call that the server's stop cancelled ends in its own time.
    deadline = asyncio.get_running_loop().time() + 2.0
    while shelf.num_held:
        assert asyncio.get_running_loop().time() < deadline, "blocks were held and never let go"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def promising_source(num_blocks: int) -> AsyncIterator[KVSource]:
    """One that never sends a byte of what it says it has."""
    server = GrpcServer("127.0.0.1", 0)
    server.add(kv_blocks_pb2_grpc.add_KVBlocksServicer_to_server, _Promising(num_blocks), SERVICE)
    try:
        await server.start()
        yield KVSource(SOURCE_ID, INCARNATION, server.address, num_blocks)
    finally:
        await server.stop()
