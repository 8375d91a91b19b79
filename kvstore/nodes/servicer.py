"""`pdmesh.v1.KVNode`: flows into and out of this node's memory, steered by the worker's leader on another node."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

from kvstore.transfer.base import BlockMemory, Grant, SlicedMemory, TransferStats
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.messages import failed_to_pb, grant_from_pb, grant_to_pb, offers_from_pb, run_from_pb
from kvstore.transfer.receipt import Expected, Receipt
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.senders import KVSenders
from kvstore.transfer.shipment import Shipment
from kvstore.transfer.streams import responses_of
from pdmesh.errors import CancelledRequestError, InvalidRequestError, MeshError, TicketError
from pdmesh.hashing import BlockHash
from pdmesh.tasks import beside
from pdmesh.v1 import kv_node_pb2 as pb
from pdmesh.v1 import kv_node_pb2_grpc
from pdmesh.v1 import kv_transfer_pb2 as kv_pb

SERVICE = pb.DESCRIPTOR.services_by_name["KVNode"].full_name


class KVNodeServicer(kv_node_pb2_grpc.KVNodeServicer):
    """See proto/pdmesh/v1/kv_node.proto.

    Args:
        token: That the leader shows.
        memory: Of this node, in which blocks lie as if they lay here whole.
        num_blocks: Of them.
        hub: Receives.
        senders: Of an incarnation.
        journal: Told of transports that gave way to the next.
    """

    def __init__(
        self,
        token: str,
        memory: BlockMemory,
        num_blocks: int,
        hub: ReceiverHub,
        senders: Callable[[str], KVSenders],
        journal: TransferJournal,
    ) -> None:
        self._token = token
        self._memory = memory
        self._num_blocks = num_blocks
        self._hub = hub
        self._senders = senders
        self._journal = journal

    async def Receive(
        self, request_iterator: AsyncIterator[pb.ReceiveRequest], context: object
    ) -> AsyncIterator[pb.ReceiveResponse]:
        opening = await anext(aiter(request_iterator), pb.ReceiveRequest())
        start = opening.start
        self._check(start.token, start.run)
        self._check_blocks(start.block_ids, start.block_hashes)
        if len(set(start.block_ids)) < len(start.block_ids):
            raise InvalidRequestError("one block for two of the prompt's", stage="transfer")
        expected = Expected(
            start.request_id,
            start.epoch,
            start.sender_id,
            start.sender_incarnation,
            tuple(start.block_ids),
            tuple(map(BlockHash, start.block_hashes)),
            run_from_pb(start.run),
        )
        receipt = Receipt(self._hub, self._journal)

        async def listen() -> None:
            async for request in request_iterator:
                if request.HasField("failed"):
                    receipt.failed(request.failed.grant_number, request.failed.reason, request.failed.message)
                else:
                    receipt.alive()
            raise _left()

        async def work(emit: Callable[[pb.ReceiveResponse], None]) -> None:
            async def grant(number: int, granted: Grant) -> None:
                emit(pb.ReceiveResponse(grant=grant_to_pb(number, granted)))

            stats = await beside(receipt.run(expected, tuple(start.transports), grant), listen())
            self._memory.to_device(expected.block_ids)
            emit(pb.ReceiveResponse(complete=_complete(stats)))

        async with aclosing(responses_of(work, pb.ReceiveResponse(heartbeat=kv_pb.Heartbeat()))) as responses:
            async for response in responses:
                yield response

    async def Send(
        self, request_iterator: AsyncIterator[pb.SendRequest], context: object
    ) -> AsyncIterator[pb.SendResponse]:
        opening = await anext(aiter(request_iterator), pb.SendRequest())
        start = opening.start
        self._check(start.token, start.run)
        senders = self._senders(start.incarnation)
        memory = SlicedMemory(self._memory, run_from_pb(start.run))

        async def work(emit: Callable[[pb.SendResponse], None]) -> None:
            def on_failed(number: int, error: MeshError) -> None:
                emit(pb.SendResponse(failed=failed_to_pb(number, error)))

            async def negotiate() -> None:
                negotiation = await senders.negotiate(offers_from_pb(start.offers), start.receiver_id)
                said = pb.FlowNegotiated(transports=negotiation.usable, unusable=dict(negotiation.unusable))
                emit(pb.SendResponse(negotiated=said))
                # Nothing more to do, and no reason to end.
                await asyncio.Event().wait()

            async with aclosing(Shipment(memory, senders, start.request_id, start.receiver_id, on_failed)) as shipment:
                stats = await beside(shipment.wait(), self._listen(request_iterator, shipment), negotiate())
            emit(pb.SendResponse(complete=_complete(stats)))

        async with aclosing(responses_of(work, pb.SendResponse(heartbeat=kv_pb.Heartbeat()))) as responses:
            async for response in responses:
                yield response

    async def _listen(self, requests: AsyncIterator[pb.SendRequest], shipment: Shipment) -> None:
        block_ids: list[int] = []
        hashes: list[BlockHash] = []
        async for request in requests:
            match request.WhichOneof("event"):
                case "offer":
                    offer = request.offer
                    self._check_blocks(offer.block_ids, offer.block_hashes)
                    block_ids += offer.block_ids
                    hashes += map(BlockHash, offer.block_hashes)
                    shipment.offer(tuple(block_ids), tuple(hashes), last=offer.last)
                case "grant":
                    shipment.granted(request.grant.number, grant_from_pb(request.grant))
                case "heartbeat":
                    shipment.alive()
        raise _left()

    def _check(self, token: str, run: kv_pb.BlockRun) -> None:
        """Raises TicketError for anyone but the leader, InvalidRequestError for bytes that no block has."""
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            raise TicketError("this node moves KV for its own group alone", reason="TICKET_SENDER", stage="transfer")
        if not 0 < run.num_bytes <= self._memory.block_bytes - run.offset_bytes:
            raise InvalidRequestError("a run outside of a block", stage="transfer")

    def _check_blocks(self, block_ids: Sequence[int], block_hashes: Sequence[bytes]) -> None:
        if len(block_ids) != len(block_hashes):
            raise InvalidRequestError("as many blocks need as many hashes", stage="transfer")
        if any(not 0 <= block_id < self._num_blocks for block_id in block_ids):
            raise InvalidRequestError(f"a block that is none of the {self._num_blocks}", stage="transfer")


def _complete(stats: TransferStats) -> pb.FlowComplete:
    return pb.FlowComplete(num_bytes=stats.num_bytes, num_parts=stats.num_parts, duration_s=stats.duration_s)


def _left() -> CancelledRequestError:
    return CancelledRequestError("the leader closed its side before the flow was complete", stage="transfer")
