"""Moves the KV of a node that is not the leader's: a thread with a gRPC server beside the rank's steps."""

import asyncio
import threading
from concurrent.futures import Future

from prometheus_client import CollectorRegistry

from engine.kv_cache import KVCache
from kvstore.nodes.servicer import SERVICE, KVNodeServicer
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.senders import KVSenders
from pdmesh.channels import ChannelPool
from pdmesh.config import ServiceConfig
from pdmesh.ranks.place import RankPlace
from pdmesh.server import GrpcServer
from pdmesh.v1 import kv_node_pb2_grpc

# The address of the service KVNode, and the names and addresses of the transports on which the node receives.
NodeAddress = tuple[str, tuple[tuple[str, str], ...]]


def move_kv(kv_cache: KVCache, config: ServiceConfig, transports: tuple[str, ...], place: RankPlace) -> NodeAddress:
    """Starts moving `kv_cache`'s blocks, for as long as this process lives, and says where.

    The leader reaches this node where the ranks reach each other, other workers where the operator said.

    Raises ConfigError where it cannot listen.
    """
    started: Future[NodeAddress] = Future()

    async def serve() -> None:
        try:
            servers, address = await _start(kv_cache, config, transports, place)
        except Exception as error:
            started.set_exception(error)
            return
        started.set_result(address)
        # Servers end with the last reference to them.
        await asyncio.gather(*(server.wait_stopped() for server in servers))

    threading.Thread(target=lambda: asyncio.run(serve()), name="kv-node", daemon=True).start()
    return started.result()


async def _start(
    kv_cache: KVCache, config: ServiceConfig, transports: tuple[str, ...], place: RankPlace
) -> tuple[tuple[GrpcServer, GrpcServer], NodeAddress]:
    # Free ports: the one that was configured is the leader's.
    server = GrpcServer(config.host, 0, config.advertised_host)
    steering = GrpcServer(place.host, 0)
    journal = TransferJournal(CollectorRegistry())
    channels = ChannelPool()
    hub = ReceiverHub(kv_cache, transports, server, config.host, config.advertised_host, journal)
    senders: dict[str, KVSenders] = {}

    def senders_of(incarnation: str) -> KVSenders:
        if incarnation not in senders:
            senders[incarnation] = KVSenders(kv_cache, incarnation, channels.get, journal, transports)
        return senders[incarnation]

    servicer = KVNodeServicer(place.token, kv_cache, kv_cache.num_blocks, hub, senders_of, journal)
    steering.add(kv_node_pb2_grpc.add_KVNodeServicer_to_server, servicer, SERVICE)
    for each in (server, steering):
        await each.start()
        await each.set_serving(True)
    await hub.start()
    return (server, steering), (steering.address, tuple((offer.name, offer.address) for offer in hub.offers))
