"""A flow of another node of this worker, steered from its leader over the service KVNode."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from kvstore.transfer.base import Grant, TransferStats, TransportOffer
from kvstore.transfer.messages import grant_from_pb, grant_to_pb, offers_to_pb, run_to_pb
from kvstore.transfer.receipt import Expected
from kvstore.transfer.senders import Negotiation
from kvstore.transfer.streams import ClientStream
from pdmesh.errors import MeshError, UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.tasks import beside, settled
from pdmesh.types import BlockRun, KVNode
from pdmesh.v1 import kv_node_pb2 as pb
from pdmesh.v1 import kv_node_pb2_grpc
from pdmesh.v1 import kv_transfer_pb2 as kv_pb

# Told, in words for a person, that a node is lost in the middle of a flow: nobody knows what it still moves.
OnNodeLost = Callable[[str], None]


class RemoteReceipt:
    """A flow into another node's memory, as `Receipt` is one into this one's. Used once, on one event loop."""

    def __init__(self, channel: grpc.aio.Channel, node: KVNode, on_lost: OnNodeLost) -> None:
        self._stub = kv_node_pb2_grpc.KVNodeStub(channel)
        self._node = node
        self._on_lost = on_lost
        self._said: asyncio.Queue[pb.ReceiveRequest] = asyncio.Queue()

    async def run(
        self, expected: Expected, transports: Sequence[str], grant: Callable[[int, Grant], Awaitable[None]]
    ) -> TransferStats:
        """As `Receipt.run`."""
        assert expected.run is not None
        start = pb.ReceiveStart(
            token=self._node.token,
            request_id=expected.request_id,
            epoch=expected.epoch,
            sender_id=expected.sender_id,
            sender_incarnation=expected.sender_incarnation,
            block_ids=expected.block_ids,
            block_hashes=expected.block_hashes,
            run=run_to_pb(expected.run),
            transports=transports,
        )
        stream: ClientStream[pb.ReceiveRequest, pb.ReceiveResponse] = ClientStream(
            self._stub.Receive(), self._node.address, pb.ReceiveRequest(heartbeat=kv_pb.Heartbeat()), stage="transfer"
        )

        async def receive() -> TransferStats:
            async for response in stream.responses():
                match response.WhichOneof("event"):
                    case "grant":
                        await grant(response.grant.number, grant_from_pb(response.grant))
                    case "complete":
                        return _stats(response.complete)
            raise UnavailableError(f"{self._node.address} ended a flow early", stage="transfer")

        try:
            await stream.write(pb.ReceiveRequest(start=start))
            return await beside(receive(), _pass_on(self._said, stream))
        finally:
            # The node ends the stream when no writer can reach the blocks.
            await settled(asyncio.ensure_future(_end(stream, self._node, self._on_lost)))

    def alive(self) -> None:
        self._said.put_nowait(pb.ReceiveRequest(heartbeat=kv_pb.Heartbeat()))

    def failed(self, number: int, reason: str, message: str) -> None:
        failed = kv_pb.TransferFailed(grant_number=number, reason=reason, message=message)
        self._said.put_nowait(pb.ReceiveRequest(failed=failed))


class RemoteShipment:
    """A flow out of another node's memory, as `Shipment` is one out of this one's.

    Args:
        incarnation: To which tickets are bound.
        offers: Of the receiver.
        on_failed: Told of each grant that came to nothing: its number, and why.
        on_lost: Told where the node is.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        node: KVNode,
        request_id: str,
        receiver_id: str,
        incarnation: str,
        run: BlockRun,
        offers: Sequence[TransportOffer],
        on_failed: Callable[[int, MeshError], None],
        on_lost: OnNodeLost,
    ) -> None:
        stub = kv_node_pb2_grpc.KVNodeStub(channel)
        self._stream: ClientStream[pb.SendRequest, pb.SendResponse] = ClientStream(
            stub.Send(), node.address, pb.SendRequest(heartbeat=kv_pb.Heartbeat()), stage="transfer"
        )
        self._node = node
        self._on_failed = on_failed
        self._on_lost = on_lost
        self._ending: asyncio.Future[None] | None = None
        self._said: asyncio.Queue[pb.SendRequest] = asyncio.Queue()
        self._num_offered = 0
        self._negotiated: asyncio.Future[Negotiation] = asyncio.get_running_loop().create_future()
        start = pb.SendStart(
            token=node.token,
            request_id=request_id,
            receiver_id=receiver_id,
            incarnation=incarnation,
            run=run_to_pb(run),
            offers=offers_to_pb(offers),
        )
        self._said.put_nowait(pb.SendRequest(start=start))
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(self._on_end)

    async def negotiated(self) -> Negotiation:
        """Which of the receiver's offers the node can use. Raises MeshError where it can use none, or is gone."""
        return await asyncio.shield(self._negotiated)

    def offer(self, block_ids: Sequence[int], block_hashes: Sequence[BlockHash], *, last: bool) -> None:
        new = slice(self._num_offered, None)
        offer = pb.SendOffer(block_ids=block_ids[new], block_hashes=block_hashes[new], last=last)
        self._num_offered = len(block_ids)
        self._said.put_nowait(pb.SendRequest(offer=offer))

    def granted(self, number: int, grant: Grant) -> None:
        self._said.put_nowait(pb.SendRequest(grant=grant_to_pb(number, grant)))

    def alive(self) -> None:
        self._said.put_nowait(pb.SendRequest(heartbeat=kv_pb.Heartbeat()))

    async def wait(self) -> TransferStats:
        return await asyncio.shield(self._running)

    async def aclose(self) -> None:
        # The node ends the stream when nobody there reads the blocks.
        if self._ending is None:
            self._ending = asyncio.ensure_future(_end(self._stream, self._node, self._on_lost))
        await settled(self._ending)
        await settled(self._running)

    async def _run(self) -> TransferStats:
        try:
            return await beside(self._receive(), _pass_on(self._said, self._stream))
        except MeshError as error:
            if self._ending is None:
                raise
            raise UnavailableError(
                "the sender gave the transfer up", reason="TRANSFER_ABORTED", stage="transfer"
            ) from error

    async def _receive(self) -> TransferStats:
        async for response in self._stream.responses():
            match response.WhichOneof("event"):
                case "negotiated":
                    said = response.negotiated
                    self._negotiated.set_result(Negotiation(tuple(said.transports), dict(said.unusable)))
                case "failed":
                    failed = response.failed
                    error = UnavailableError(failed.message, reason=failed.reason, stage="transfer")
                    self._on_failed(failed.grant_number, error)
                case "complete":
                    return _stats(response.complete)
        raise UnavailableError(f"{self._node.address} ended a flow early", stage="transfer")

    def _on_end(self, running: "asyncio.Task[TransferStats]") -> None:
        """Whoever waits for the negotiation learns that there will be none. Perhaps nobody waits, for that or this."""
        error = None if running.cancelled() else running.exception()
        if not self._negotiated.done():
            self._negotiated.set_exception(error or UnavailableError("the flow was given up", stage="transfer"))
            self._negotiated.exception()


async def _end(stream: "ClientStream[Any, Any]", node: KVNode, on_lost: OnNodeLost) -> None:
    if not await stream.end():
        on_lost(f"the node at {node.address} did not end a flow of KV: what it still moves is not known")


async def _pass_on(said: "asyncio.Queue[Any]", stream: "ClientStream[Any, Any]") -> None:
    while True:
        await stream.write(await said.get())


def _stats(complete: pb.FlowComplete) -> TransferStats:
    return TransferStats(complete.num_bytes, complete.num_parts, complete.duration_s)
