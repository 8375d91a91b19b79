"""Workers of several nodes without engines: plain bytes, real transports, the real service KVNode between nodes."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

from kvstore.nodes.arrival import Arrival, ReceivingNodes
from kvstore.nodes.departure import Departure, SendingNodes
from kvstore.nodes.servicer import SERVICE, KVNodeServicer
from kvstore.transfer.base import BlockMemory, Grant, KVSender, TransferStats
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.receipt import Expected
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.senders import KVSenders
from pdmesh.channels import ChannelPool
from pdmesh.errors import MeshError
from pdmesh.server import GrpcServer
from pdmesh.types import BlockRun, KVNode
from pdmesh.v1 import kv_node_pb2_grpc
from tests.fault_proxy import FaultProxy
from tests.kv_endpoints import EPOCH, INCARNATION, REQUEST_ID, SENDER_ID, BytesMemory, hashes, new_journal

NUM_BLOCKS = 12
BLOCK_BYTES = 48 * 1024
TOKEN = "token"
HOST = "127.0.0.1"

Runs = tuple[BlockRun, ...]


def in_parts(*parts: Sequence[int], of: int) -> list[Runs]:
    """The runs of each node, where a block is `of` equal pieces and each node has those that it names."""
    size = BLOCK_BYTES // of
    return [tuple(BlockRun(piece * size, size) for piece in pieces) for pieces in parts]


WHOLE = in_parts([0], of=1)
# By heads, as tensor-parallel ranks divide them; by layers of two heads, as a pipeline's stages do.
HEADS = in_parts([0], [1], of=2)
LAYERS = in_parts([0, 2], [1, 3], of=4)
# Each of two nodes has all, as where there are more ranks than KV heads.
REPLICATED = [WHOLE[0], WHOLE[0]]


class RoutedSenders(KVSenders):
    """Reaches the addresses in `routes` through a proxy."""

    routes: dict[str, FaultProxy]

    def sender(self, grant: Grant, request_id: str, memory: BlockMemory | None = None) -> KVSender:
        if (proxy := self.routes.get(grant.address)) is not None:
            grant = replace(grant, address=proxy.address)
        return super().sender(grant, request_id, memory)


@dataclass
class Node:
    """One node: what it holds, and what moves it."""

    runs: Runs
    memory: BytesMemory
    hub: ReceiverHub
    senders: RoutedSenders
    journal: TransferJournal
    steering: GrpcServer | None = None

    @property
    def kv(self) -> KVNode:
        """As the leader knows it."""
        if self.steering is None:
            return KVNode(self.runs)
        offers = tuple((offer.name, offer.address) for offer in self.hub.offers)
        return KVNode(self.runs, self.steering.address, TOKEN, offers)


@dataclass
class SpreadWorker:
    """A worker; its first node leads.

    Attributes:
        known: Its nodes as the leader knows them: to be told otherwise.
        lost: Why nodes are, as the leader was told.
    """

    nodes: list[Node]
    receiving: ReceivingNodes
    sending: SendingNodes
    known: list[KVNode]
    lost: list[str]

    def check_idle(self) -> None:
        for node in self.nodes:
            node.hub.check_invariants()
            assert node.hub.num_open_tickets == 0
            assert node.journal.num_live == 0


@asynccontextmanager
async def spread_worker(
    runs: Sequence[Runs], transports: Sequence[str], *, seed: int | None = None
) -> AsyncIterator[SpreadWorker]:
    """A worker with a node for each of `runs`; with a seed, each node's memory holds bytes of its own."""
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(_node(place, held, transports, seed)) for place, held in enumerate(runs)
        ]
        known = [node.kv for node in nodes]
        leader = nodes[0]
        channels = ChannelPool()
        stack.push_async_callback(channels.aclose)
        lost: list[str] = []
        receiving = ReceivingNodes(lambda: tuple(known), leader.hub, channels, leader.journal, lost.append)
        sending = SendingNodes(lambda: tuple(known), leader.memory, leader.senders, INCARNATION, channels, lost.append)
        yield SpreadWorker(nodes, receiving, sending, known, lost)


@asynccontextmanager
async def _node(place: int, runs: Runs, transports: Sequence[str], seed: int | None) -> AsyncIterator[Node]:
    memory = BytesMemory(NUM_BLOCKS, BLOCK_BYTES, None if seed is None else seed + place)
    journal = new_journal()
    server = GrpcServer(HOST, 0)
    hub = ReceiverHub(memory, transports, server, HOST, HOST, journal)
    channels = ChannelPool()
    senders = RoutedSenders(memory, INCARNATION, channels.get, journal, transports)
    senders.routes = {}
    node = Node(runs, memory, hub, senders, journal)
    servers = [server]
    if place:
        node.steering = GrpcServer(HOST, 0)
        servicer = KVNodeServicer(TOKEN, memory, NUM_BLOCKS, hub, lambda incarnation: senders, journal)
        node.steering.add(kv_node_pb2_grpc.add_KVNodeServicer_to_server, servicer, SERVICE)
        servers.append(node.steering)
    try:
        for each in servers:
            await each.start()
        await hub.start()
        yield node
    finally:
        await senders.aclose()
        await channels.aclose()
        await hub.aclose()
        for each in servers:
            await each.stop()


@dataclass
class Handoff:
    """A prompt on its way: what either end says reaches the other at once.

    Attributes:
        transports: That the receiver offers.
        grants: Transports granted, by flow.
        failed: What the sender said of grants: flow and reason.
    """

    arrival: Arrival
    departure: Departure
    block_ids: Sequence[int]
    transports: Sequence[str]
    grants: dict[int, list[str]] = field(default_factory=dict)
    failed: list[tuple[int, str]] = field(default_factory=list)

    async def receive(self) -> TransferStats:
        async def grant(flow: int, number: int, granted: Grant) -> None:
            self.grants.setdefault(flow, []).append(granted.transport)
            self.departure.granted(flow, number, granted)

        expected = Expected(REQUEST_ID, EPOCH, SENDER_ID, INCARNATION, self.block_ids, hashes(len(self.block_ids)))
        return await self.arrival.run(expected, await self.departure.negotiated(), grant)

    def offer(self, source_ids: Sequence[int]) -> None:
        """All blocks that travel are computed up to these."""
        last = len(source_ids) == len(self.block_ids)
        self.departure.offer(source_ids, hashes(len(source_ids)), last=last)

    async def beat(self) -> None:
        while True:
            self.arrival.alive()
            self.departure.alive()
            await asyncio.sleep(0.2)


@asynccontextmanager
async def handoff(sender: SpreadWorker, receiver: SpreadWorker, block_ids: Sequence[int]) -> AsyncIterator[Handoff]:
    """Into `block_ids` of the receiver. Both ends give signs of life until its end."""

    def on_failed(flow: int, number: int, error: MeshError) -> None:
        made.failed.append((flow, error.reason))
        made.arrival.failed(flow, number, error.reason, error.message)

    arrival = Arrival(receiver.receiving)
    departure = sender.sending.departure(receiver.receiving.receivers, REQUEST_ID, "decode-0", on_failed)
    transports = [offer.name for offer in receiver.nodes[0].hub.offers]
    made = Handoff(arrival, departure, block_ids, transports)
    beating = asyncio.create_task(made.beat())
    try:
        async with aclosing(departure):
            yield made
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
