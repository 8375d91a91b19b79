"""A prompt's KV on its way out of a worker: one shipment for each flow, here or on another node of the worker."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from kvstore.nodes.arrival import summed
from kvstore.nodes.flows import Flow, Receiver, planned_flows
from kvstore.nodes.remote import OnNodeLost, RemoteShipment
from kvstore.transfer.base import BlockMemory, Grant, SlicedMemory, TransferStats
from kvstore.transfer.senders import KVSenders, Negotiation
from kvstore.transfer.shipment import Shipment
from pdmesh.channels import ChannelPool
from pdmesh.errors import InvalidRequestError, MeshError
from pdmesh.hashing import BlockHash
from pdmesh.tasks import settled
from pdmesh.types import BlockRun, KVNode


class FlowShipment(Protocol):
    """What `kvstore.transfer.shipment.Shipment` is to whoever uses it."""

    def offer(self, block_ids: Sequence[int], block_hashes: Sequence[BlockHash], *, last: bool) -> None: ...
    def granted(self, number: int, grant: Grant) -> None: ...
    def alive(self) -> None: ...
    async def wait(self) -> TransferStats: ...
    async def aclose(self) -> None: ...


class SendingNodes:
    """The nodes of one worker, as they send.

    Args:
        nodes: Of the engine, once it has loaded; the first is this process's.
        memory: Of this process.
        senders: Of this process.
        incarnation: The worker's, to which tickets are bound.
        channels: To the other nodes.
        on_lost: Told of a node that is; this worker must not go on then.
    """

    def __init__(
        self,
        nodes: Callable[[], tuple[KVNode, ...]],
        memory: BlockMemory,
        senders: KVSenders,
        incarnation: str,
        channels: ChannelPool,
        on_lost: OnNodeLost,
    ) -> None:
        self._nodes = nodes
        self._memory = memory
        self._senders = senders
        self._incarnation = incarnation
        self._channels = channels
        self._on_lost = on_lost

    def departure(
        self,
        receivers: Sequence[Receiver],
        request_id: str,
        receiver_id: str,
        on_failed: Callable[[int, int, MeshError], None],
    ) -> "Departure":
        """All flows of one prompt.

        Args:
            request_id: To which tickets are bound.
            receiver_id: The worker at the other end.
            on_failed: Told of each grant that came to nothing: of which flow, its number, and why.

        Raises InvalidRequestError where nobody is to receive anything.
        """
        if not receivers:
            raise InvalidRequestError("a prompt's KV needs a receiver", stage="transfer")
        return Departure(
            [
                self._flow(place, node, receivers[receiver], receiver, run, request_id, receiver_id, on_failed)
                for place, (node, receiver, run) in enumerate(planned_flows(self._nodes(), receivers))
            ]
        )

    def _flow(
        self,
        place: int,
        node: KVNode,
        receiver: Receiver,
        receiver_place: int,
        run: BlockRun,
        request_id: str,
        receiver_id: str,
        on_failed: Callable[[int, int, MeshError], None],
    ) -> "_DepartingFlow":
        def on_flow_failed(number: int, error: MeshError) -> None:
            on_failed(place, number, error)

        if node.address:
            remote = RemoteShipment(
                self._channels.get(node.address),
                node,
                request_id,
                receiver_id,
                self._incarnation,
                run,
                receiver.offers,
                on_flow_failed,
                self._on_lost,
            )
            return _DepartingFlow(receiver_place, run, remote, asyncio.create_task(remote.negotiated()))
        whole = run == BlockRun(0, self._memory.block_bytes)
        memory = self._memory if whole else SlicedMemory(self._memory, run)
        shipment = Shipment(memory, self._senders, request_id, receiver_id, on_flow_failed)
        negotiating = asyncio.create_task(self._senders.negotiate(receiver.offers, receiver_id))
        return _DepartingFlow(receiver_place, run, shipment, negotiating)


class _DepartingFlow:
    def __init__(
        self, receiver: int, run: BlockRun, shipment: FlowShipment, negotiating: "asyncio.Task[Negotiation]"
    ) -> None:
        self.receiver = receiver
        self.run = run
        self.shipment = shipment
        self.negotiating = negotiating


class Departure:
    """Everything is called on one event loop. `aclose` in any case; the blocks may be reused only then."""

    def __init__(self, flows: Sequence[_DepartingFlow]) -> None:
        self._flows = flows

    async def negotiated(self) -> tuple[Flow, ...]:
        """What the receiver is told of the flows. Raises MeshError where one of them finds no way."""
        flows = []
        for flow in self._flows:
            negotiation = await asyncio.shield(flow.negotiating)
            unusable = tuple(negotiation.unusable.items())
            flows.append(Flow(flow.receiver, flow.run, tuple(negotiation.usable), unusable))
        return tuple(flows)

    def offer(self, block_ids: Sequence[int], block_hashes: Sequence[BlockHash], *, last: bool) -> None:
        """These blocks, of those that travel and from the first on, are computed; with `last` there will be no more."""
        for flow in self._flows:
            flow.shipment.offer(block_ids, block_hashes, last=last)

    def granted(self, flow: int, number: int, grant: Grant) -> None:
        """The receiver granted a ticket for a flow, its `number`th; it takes the place of those before."""
        if flow < len(self._flows):
            self._flows[flow].shipment.granted(number, grant)

    def alive(self) -> None:
        """The receiver gave a sign of life."""
        for flow in self._flows:
            flow.shipment.alive()

    async def wait(self) -> TransferStats:
        """Returns when the receiver has verified every byte. Raises MeshError: what a flow failed with."""
        try:
            async with asyncio.TaskGroup() as group:
                waiting = [group.create_task(flow.shipment.wait()) for flow in self._flows]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        return summed([task.result() for task in waiting])

    async def aclose(self) -> None:
        """Gives up what is not finished; returns when nobody reads the blocks any more. Idempotent."""
        for flow in self._flows:
            flow.negotiating.cancel()
        ending = [asyncio.ensure_future(flow.shipment.aclose()) for flow in self._flows]
        await settled(asyncio.gather(*ending, *(flow.negotiating for flow in self._flows), return_exceptions=True))
