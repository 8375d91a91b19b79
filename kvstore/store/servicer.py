"""`KVStore.Put` on the store's side: what it lacks of a prompt's blocks comes in, and is kept once all is verified."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from kvstore.exchange.servicer import parse_hashes
from kvstore.store.blocks import StoreBlocks
from kvstore.transfer.base import Grant
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.messages import grant_to_pb, offers_to_pb
from kvstore.transfer.receipt import Expected, Receipt
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.states import LEASE_S
from kvstore.transfer.streams import responses_of
from pdmesh.errors import CancelledRequestError, ConfigError, InvalidRequestError, OverloadedError, UnavailableError
from pdmesh.tasks import beside
from pdmesh.types import PairingFacts
from pdmesh.v1 import kv_blocks_pb2 as pb
from pdmesh.v1 import kv_blocks_pb2_grpc
from pdmesh.v1 import kv_transfer_pb2 as kv_pb


class PutServicer(kv_blocks_pb2_grpc.KVStoreServicer):
    """Takes blocks into `blocks` through `hub`."""

    def __init__(self, blocks: StoreBlocks, hub: ReceiverHub, journal: TransferJournal) -> None:
        self._blocks = blocks
        self._hub = hub
        self._journal = journal

    async def Put(
        self, request_iterator: AsyncIterator[pb.PutRequest], context: object
    ) -> AsyncIterator[pb.PutResponse]:
        opening = await anext(aiter(request_iterator), None)
        if opening is None or not opening.HasField("start"):
            raise InvalidRequestError("KVStore.Put must begin with a PutStart", stage="transfer")
        start = opening.start

        async def work(emit: Callable[[pb.PutResponse], None]) -> None:
            await self._take(start, request_iterator, emit)

        async with aclosing(responses_of(work, pb.PutResponse(heartbeat=kv_pb.Heartbeat()))) as responses:
            async for response in responses:
                yield response

    async def _take(
        self, start: pb.PutStart, requests: AsyncIterator[pb.PutRequest], emit: Callable[[pb.PutResponse], None]
    ) -> None:
        hashes = parse_hashes(start.block_hashes)
        try:
            self._blocks.open(PairingFacts.from_pb(start.facts), start.block_bytes)
        except ConfigError as error:
            raise OverloadedError(f"this store cannot keep such blocks: {error.message}", stage="transfer") from error
        lacking = self._blocks.lacking(hashes)
        slots = self._blocks.reserve(len(lacking))
        try:
            # What comes first is worth most: without it the rest cannot be found.
            indexes = lacking[: len(slots)]
            wanted = pb.PutWanted(indexes=indexes, offers=offers_to_pb(self._hub.offers))
            emit(pb.PutResponse(wanted=wanted))
            if not indexes:
                return
            ready = await _ready(requests)
            receipt = Receipt(self._hub, self._journal)
            expected = Expected(
                start.request_id, 0, start.sender_id, start.sender_incarnation, slots, [hashes[i] for i in indexes]
            )

            async def grant(number: int, grant: Grant) -> None:
                emit(pb.PutResponse(grant=grant_to_pb(number, grant)))

            stats = await beside(receipt.run(expected, list(ready.transports), grant), _listen(requests, receipt))
            self._blocks.commit(slots, expected.block_hashes)
            slots = []
            emit(pb.PutResponse(complete=pb.BlocksComplete(num_bytes=stats.num_bytes)))
        finally:
            self._blocks.release(slots)


async def _ready(requests: AsyncIterator[pb.PutRequest]) -> pb.PutReady:
    """On what the worker can send. Raises CancelledRequestError, or UnavailableError where it hangs: it holds slots."""
    try:
        async with asyncio.timeout(LEASE_S):
            async for request in requests:
                if request.HasField("ready"):
                    return request.ready
    except TimeoutError as error:
        raise UnavailableError(
            f"the worker was not ready to send within {LEASE_S:g} s", reason="LEASE_EXPIRED", stage="transfer"
        ) from error
    raise CancelledRequestError("the worker left before it was ready to send", stage="transfer")


async def _listen(requests: AsyncIterator[pb.PutRequest], receipt: Receipt) -> None:
    async for request in requests:
        receipt.alive()
        if request.HasField("transfer_failed"):
            failed = request.transfer_failed
            receipt.failed(failed.grant_number, failed.reason, failed.message)
    raise CancelledRequestError("the worker left before all was sent", stage="transfer")
