"""A prompt's KV on its way into a worker: one receipt for each flow, here or on another node of the worker."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from kvstore.nodes.flows import Flow, Receiver, check_flows
from kvstore.nodes.remote import OnNodeLost, RemoteReceipt
from kvstore.transfer.base import Grant, TransferStats, TransportOffer
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.receipt import Expected, Receipt
from kvstore.transfer.receiver import ReceiverHub
from pdmesh.channels import ChannelPool
from pdmesh.types import KVNode


class FlowReceipt(Protocol):
    """What `kvstore.transfer.receipt.Receipt` is to whoever uses it."""

    async def run(
        self, expected: Expected, transports: Sequence[str], grant: Callable[[int, Grant], Awaitable[None]]
    ) -> TransferStats: ...
    def alive(self) -> None: ...
    def failed(self, number: int, reason: str, message: str) -> None: ...


class ReceivingNodes:
    """The nodes of one worker, as they receive.

    Args:
        nodes: Of the engine, once it has loaded; the first is this process's.
        hub: Receives here.
        channels: To the other nodes.
        journal: Told of transports that gave way to the next.
        on_lost: Told of a node that is; this worker must not go on then.
    """

    def __init__(
        self,
        nodes: Callable[[], tuple[KVNode, ...]],
        hub: ReceiverHub,
        channels: ChannelPool,
        journal: TransferJournal,
        on_lost: OnNodeLost,
    ) -> None:
        self._nodes = nodes
        self._hub = hub
        self._channels = channels
        self._journal = journal
        self._on_lost = on_lost

    @property
    def receivers(self) -> tuple[Receiver, ...]:
        """What a sender is told of them."""
        own, *others = self._nodes()
        offered = [tuple(TransportOffer(*offer) for offer in node.offers) for node in others]
        return (
            Receiver(own.runs, tuple(self._hub.offers)),
            *(Receiver(node.runs, offers) for node, offers in zip(others, offered, strict=True)),
        )

    def receipt(self, receiver: int) -> FlowReceipt:
        node = self._nodes()[receiver]
        if not node.address:
            return Receipt(self._hub, self._journal)
        return RemoteReceipt(self._channels.get(node.address), node, self._on_lost)


class Arrival:
    """All flows of one prompt; used once, on one event loop."""

    def __init__(self, nodes: ReceivingNodes) -> None:
        self._nodes = nodes
        self._receipts: list[FlowReceipt] = []

    async def run(
        self, expected: Expected, flows: Sequence[Flow], grant: Callable[[int, int, Grant], Awaitable[None]]
    ) -> TransferStats:
        """Returns when every byte is here and verified; no writer can reach the blocks any more, however it ends.

        Args:
            expected: With no run: the flows have theirs.
            flows: As the sender said.
            grant: Sends the sender a grant: of which flow, its number and itself.

        Raises MeshError: what a flow failed with.
        """
        check_flows(flows, self._nodes.receivers)
        self._receipts = [self._nodes.receipt(flow.receiver) for flow in flows]

        async def receive(place: int, flow: Flow) -> TransferStats:
            async def grant_flow(number: int, granted: Grant) -> None:
                await grant(place, number, granted)

            return await self._receipts[place].run(replace(expected, run=flow.run), flow.transports, grant_flow)

        try:
            async with asyncio.TaskGroup() as group:
                receiving = [group.create_task(receive(place, flow)) for place, flow in enumerate(flows)]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        stats = [task.result() for task in receiving]
        return summed(stats)

    def alive(self) -> None:
        """The sender gave a sign of life."""
        for receipt in self._receipts:
            receipt.alive()

    def failed(self, flow: int, number: int, reason: str, message: str) -> None:
        """The sender says that a grant came to nothing."""
        if flow < len(self._receipts):
            self._receipts[flow].failed(number, reason, message)


def summed(stats: Sequence[TransferStats]) -> TransferStats:
    """Of flows that ran at once."""
    return TransferStats(
        sum(flow.num_bytes for flow in stats),
        sum(flow.num_parts for flow in stats),
        max(flow.duration_s for flow in stats),
    )
