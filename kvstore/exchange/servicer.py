"""`KVBlocks.Fetch` on the side that has the blocks."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

from kvstore.exchange.shelf import Shelf
from kvstore.transfer.messages import failed_to_pb, grant_from_pb, offers_from_pb
from kvstore.transfer.senders import KVSenders
from kvstore.transfer.shipment import Shipment
from kvstore.transfer.streams import acknowledged, responses_of
from pdmesh.errors import CancelledRequestError, InvalidRequestError, MeshError, PreconditionError
from pdmesh.hashing import HASH_BYTES, BlockHash
from pdmesh.tasks import beside
from pdmesh.types import PairingFacts
from pdmesh.v1 import kv_blocks_pb2 as pb
from pdmesh.v1 import kv_blocks_pb2_grpc
from pdmesh.v1 import kv_transfer_pb2 as kv_pb

SERVICE = pb.DESCRIPTOR.services_by_name["KVBlocks"].full_name
# Of one call: a prompt of a million tokens in blocks of 16.
MAX_HASHES = 1 << 16

Emit = Callable[[pb.FetchResponse], None]


class FetchServicer(kv_blocks_pb2_grpc.KVBlocksServicer):
    """Serves what `shelf` holds.

    Args:
        shelf: Not owned.
        incarnation: This process's.
        senders: Of this process.
    """

    def __init__(self, shelf: Shelf, incarnation: str, senders: KVSenders) -> None:
        self._shelf = shelf
        self._incarnation = incarnation
        self._senders = senders

    async def Fetch(
        self, request_iterator: AsyncIterator[pb.FetchRequest], context: object
    ) -> AsyncIterator[pb.FetchResponse]:
        opening = await anext(aiter(request_iterator), None)
        if opening is None or not opening.HasField("start"):
            raise InvalidRequestError("KVBlocks.Fetch must begin with a FetchStart", stage="transfer")
        start = opening.start
        hashes = parse_hashes(start.block_hashes)
        check_facts(self._shelf.facts, PairingFacts.from_pb(start.facts))

        async def work(emit: Emit) -> None:
            async with aclosing(await self._shelf.hold(hashes)) as held:
                await self._send(start, hashes, held.block_ids, request_iterator, emit)

        async with aclosing(responses_of(work, pb.FetchResponse(heartbeat=kv_pb.Heartbeat()))) as responses:
            async for response in responses:
                yield response

    async def _send(
        self,
        start: pb.FetchStart,
        hashes: Sequence[BlockHash],
        block_ids: Sequence[int],
        requests: AsyncIterator[pb.FetchRequest],
        emit: Emit,
    ) -> None:
        if len(block_ids) <= start.num_held_blocks:
            emit(pb.FetchResponse(found=pb.FetchFound(num_blocks=len(block_ids), incarnation=self._incarnation)))
            return
        negotiation = await self._senders.negotiate(offers_from_pb(start.offers), start.receiver_id)
        found = pb.FetchFound(
            num_blocks=len(block_ids),
            incarnation=self._incarnation,
            transports=negotiation.usable,
            unusable=dict(negotiation.unusable),
        )

        def on_failed(grant_number: int, error: MeshError) -> None:
            emit(pb.FetchResponse(transfer_failed=failed_to_pb(grant_number, error)))

        async with aclosing(
            Shipment(self._shelf.memory, self._senders, start.request_id, start.receiver_id, on_failed)
        ) as shipment:
            travelling = slice(start.num_held_blocks, len(block_ids))
            shipment.offer(block_ids[travelling], hashes[travelling], last=True)
            emit(pb.FetchResponse(found=found))
            stats = await beside(shipment.wait(), _listen(requests, shipment))
        emit(pb.FetchResponse(complete=pb.BlocksComplete(num_bytes=stats.num_bytes)))


async def _listen(requests: AsyncIterator[pb.FetchRequest], shipment: Shipment) -> None:
    async for request in requests:
        if request.HasField("grant"):
            shipment.granted(request.grant.number, grant_from_pb(request.grant))
        else:
            shipment.alive()
    await acknowledged(
        shipment.wait(), CancelledRequestError("the caller closed its side before it had the blocks", stage="transfer")
    )


def parse_hashes(packed: Sequence[bytes]) -> list[BlockHash]:
    """Raises InvalidRequestError for what are no hashes, too many, or one twice."""
    if len(packed) > MAX_HASHES or any(len(block_hash) != HASH_BYTES for block_hash in packed):
        raise InvalidRequestError(
            f"block hashes are {HASH_BYTES} bytes each, and {MAX_HASHES} at most", stage="transfer"
        )
    if len(set(packed)) < len(packed):
        raise InvalidRequestError("a block stands in a prompt once: name each block hash once", stage="transfer")
    return [BlockHash(block_hash) for block_hash in packed]


def check_facts(ours: PairingFacts | None, theirs: PairingFacts) -> None:
    """Raises PreconditionError where the blocks of one are nothing to the other."""
    mismatch = ours.mismatch(theirs) if ours is not None else None
    if mismatch:
        raise PreconditionError(f"these blocks are of another kind: {mismatch}", reason="PAIRING_MISMATCH")
