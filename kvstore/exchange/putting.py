"""The calling end of `KVStore.Put`: what was just computed, for a store to keep.

we                                           a store
  │ ── PutStart: hashes ───────────────────▶ │  which of them it lacks and has room for
  │ ◀─────────────────── PutWanted: offers ─ │
  │ ── PutReady: usable transports ────────▶ │
  │ ◀──────────────────────── TransferGrant ─│
  │ ═══════ parts, over the transport ═════▶ │  keeps them once every byte is verified
  │ ◀─────────────────────── BlocksComplete ─│
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from kvstore.transfer.base import BlockMemory, TransferStats
from kvstore.transfer.messages import failed_to_pb, grant_from_pb, offers_from_pb
from kvstore.transfer.senders import KVSenders
from kvstore.transfer.shipment import Shipment
from kvstore.transfer.streams import ClientStream
from pdmesh.channels import ChannelPool
from pdmesh.errors import MeshError
from pdmesh.hashing import BlockHash
from pdmesh.tasks import beside
from pdmesh.types import PairingFacts
from pdmesh.v1 import kv_blocks_pb2 as pb
from pdmesh.v1 import kv_blocks_pb2_grpc
from pdmesh.v1 import kv_transfer_pb2 as kv_pb

_PutStream = ClientStream[pb.PutRequest, pb.PutResponse]


class BlockPutter:
    """Puts for one worker.

    Args:
        worker_id: This worker's.
        incarnation: Likewise.
        senders: Of this worker.
        channels: To the stores.
    """

    def __init__(self, worker_id: str, incarnation: str, senders: KVSenders, channels: ChannelPool) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._senders = senders
        self._channels = channels
        self._numbers = itertools.count()

    async def put(
        self,
        store_id: str,
        address: str,
        facts: PairingFacts,
        memory: BlockMemory,
        block_ids: Sequence[int],
        hashes: Sequence[BlockHash],
    ) -> int:
        """Gives the store at `address` what it lacks of these blocks, which must keep their bytes meanwhile.

        Returns how many bytes it took. Raises MeshError.
        """
        stub = kv_blocks_pb2_grpc.KVStoreStub(self._channels.get(address))
        request_id = f"{self._worker_id}/put-{next(self._numbers)}"
        stream: _PutStream = ClientStream(
            stub.Put(), store_id, pb.PutRequest(heartbeat=kv_pb.Heartbeat()), stage="transfer"
        )
        start = pb.PutStart(
            request_id=request_id,
            sender_id=self._worker_id,
            sender_incarnation=self._incarnation,
            facts=facts.to_pb(),
            block_bytes=memory.block_bytes,
            block_hashes=hashes,
        )
        try:
            await stream.write(pb.PutRequest(start=start))
            responses = stream.responses()
            wanted = await _wanted(responses)
            if not wanted.indexes:
                return 0
            # The store has committed what it got.
            kept = asyncio.Event()
            failures: asyncio.Queue[pb.PutRequest] = asyncio.Queue()

            def on_failed(grant_number: int, error: MeshError) -> None:
                failures.put_nowait(pb.PutRequest(transfer_failed=failed_to_pb(grant_number, error)))

            async def tell_failures() -> None:
                while True:
                    await stream.write(await failures.get())

            async def listen() -> None:
                async for response in responses:
                    match response.WhichOneof("event"):
                        case "grant":
                            shipment.granted(response.grant.number, grant_from_pb(response.grant))
                        case "complete":
                            kept.set()
                            return
                        case _:
                            shipment.alive()

            async with aclosing(Shipment(memory, self._senders, request_id, store_id, on_failed)) as shipment:
                chosen = list(wanted.indexes)
                shipment.offer([block_ids[i] for i in chosen], [hashes[i] for i in chosen], last=True)
                negotiation = await self._senders.negotiate(offers_from_pb(wanted.offers), store_id)
                ready = pb.PutReady(transports=negotiation.usable, unusable=dict(negotiation.unusable))
                await stream.write(pb.PutRequest(ready=ready))

                async def ship() -> TransferStats:
                    stats = await shipment.wait()
                    await kept.wait()
                    return stats

                stats = await beside(ship(), listen(), tell_failures(), stream.beat())
            return stats.num_bytes
        finally:
            await stream.aclose()


async def _wanted(responses: AsyncIterator[pb.PutResponse]) -> pb.PutWanted:
    """What the store says first; before it there may be signs of life, from one that opens its disk."""
    async for response in responses:
        if response.HasField("wanted"):
            return response.wanted
    return pb.PutWanted()
