"""A node that is not the leader's, as a program: to be stopped or killed.

python -m tests.kv_node_child TRANSPORT [SEED]    prints, as JSON, its address and what it offers
"""

import asyncio
import json
import sys

from kvstore.nodes.servicer import SERVICE, KVNodeServicer
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.senders import KVSenders
from pdmesh.channels import ChannelPool
from pdmesh.server import GrpcServer
from pdmesh.v1 import kv_node_pb2_grpc
from tests.kv_endpoints import INCARNATION, BytesMemory, new_journal
from tests.kv_nodes import BLOCK_BYTES, HOST, NUM_BLOCKS, TOKEN


async def main(transport: str, seed: int | None) -> None:
    memory = BytesMemory(NUM_BLOCKS, BLOCK_BYTES, seed)
    journal, channels = new_journal(), ChannelPool()
    server, steering = GrpcServer(HOST, 0), GrpcServer(HOST, 0)
    hub = ReceiverHub(memory, [transport], server, HOST, HOST, journal)
    senders = KVSenders(memory, INCARNATION, channels.get, journal, [transport])
    servicer = KVNodeServicer(TOKEN, memory, NUM_BLOCKS, hub, lambda incarnation: senders, journal)
    steering.add(kv_node_pb2_grpc.add_KVNodeServicer_to_server, servicer, SERVICE)
    await server.start()
    await steering.start()
    await hub.start()
    offers = [(offer.name, offer.address) for offer in hub.offers]
    print(json.dumps({"address": steering.address, "offers": offers}), flush=True)
    await steering.wait_stopped()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None))
