"""KV between workers of one and of two nodes, over real transports and the real service between nodes."""

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import cast

import grpc
import pytest

from kvstore.nodes.flows import planned_flows
from kvstore.nodes.remote import RemoteReceipt, RemoteShipment
from kvstore.transfer.base import TransferStats
from kvstore.transfer.receipt import Receipt
from kvstore.transfer.shipment import Shipment
from kvstore.transfer.streams import ClientStream
from kvstore.transfer.transports import TRANSPORTS
from pdmesh.channels import ChannelPool
from pdmesh.errors import InvalidRequestError, MeshError, PreconditionError, TicketError, UnavailableError
from pdmesh.v1 import kv_node_pb2 as pb
from pdmesh.v1 import kv_node_pb2_grpc
from pdmesh.v1 import kv_transfer_pb2 as kv_pb
from tests.fault_proxy import FaultProxy
from tests.kv_endpoints import EPOCH, INCARNATION, REQUEST_ID, SENDER_ID, hashes
from tests.kv_nodes import (
    BLOCK_BYTES,
    HEADS,
    LAYERS,
    NUM_BLOCKS,
    REPLICATED,
    WHOLE,
    Handoff,
    Runs,
    SpreadWorker,
    handoff,
    spread_worker,
)
from tests.kv_transfers import PATIENCE_S

PAIRS = {
    "whole to heads": (WHOLE, HEADS),
    "heads to whole": (HEADS, WHOLE),
    "layers to whole": (LAYERS, WHOLE),
    "layers to heads": (LAYERS, HEADS),
    "heads to heads": (HEADS, HEADS),
    "replicated to heads": (REPLICATED, HEADS),
    "heads to replicated": (HEADS, REPLICATED),
}
SOURCE_IDS = [5, 1, 9, 2]
TARGET_IDS = [0, 7, 3, 11]


@asynccontextmanager
async def workers(
    sending: Sequence[Runs], receiving: Sequence[Runs], transports: Sequence[str] = TRANSPORTS
) -> AsyncIterator[tuple[SpreadWorker, SpreadWorker]]:
    """A sender with random bytes, a receiver with zeros; both idle at the end, and no task left."""
    before = asyncio.all_tasks()
    async with (
        spread_worker(sending, transports, seed=1) as sender,
        spread_worker(receiving, transports) as receiver,
    ):
        yield sender, receiver
        async with asyncio.timeout(PATIENCE_S):
            while any(node.hub.num_open_tickets or node.journal.num_live for node in (*sender.nodes, *receiver.nodes)):
                await asyncio.sleep(0.01)
        sender.check_idle()
        receiver.check_idle()
        assert (sender.lost, receiver.lost) == ([], [])
    async with asyncio.timeout(PATIENCE_S):
        while left := [task for task in asyncio.all_tasks() - before if not task.done()]:
            await asyncio.wait(left)


def expected_memory(sender: SpreadWorker, receiver: SpreadWorker) -> list[bytes]:
    """Of each receiving node: the sender's bytes where it holds any, zeros elsewhere."""
    memories = [bytearray(NUM_BLOCKS * BLOCK_BYTES) for _ in receiver.nodes]
    nodes = {node.kv.address: node for node in sender.nodes}
    for node, place, run in planned_flows(sender.known, receiver.receiving.receivers):
        for source_id, target_id in zip(SOURCE_IDS, TARGET_IDS, strict=True):
            piece = nodes[node.address].memory.view(source_id)[run.offset_bytes : run.end_bytes]
            begin = target_id * BLOCK_BYTES + run.offset_bytes
            memories[place][begin : begin + run.num_bytes] = piece
    return [bytes(memory) for memory in memories]


async def ship(under_way: Handoff) -> tuple[TransferStats, TransferStats]:
    """All blocks, in two pieces; what either end counted."""
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        receiving = group.create_task(under_way.receive())
        under_way.offer(SOURCE_IDS[:1])
        await asyncio.sleep(0.01)
        under_way.offer(SOURCE_IDS)
        sending = group.create_task(under_way.departure.wait())
    return sending.result(), receiving.result()


def held_bytes(runs: Sequence[Runs]) -> int:
    return sum(run.num_bytes for of_node in runs for run in of_node) * len(SOURCE_IDS)


@pytest.mark.parametrize("transport", ["shm", "tcp", "grpc"])
@pytest.mark.parametrize("pair", PAIRS)
async def test_every_node_gets_its_bytes_and_no_other(transport: str, pair: str) -> None:
    async with workers(*PAIRS[pair], [transport]) as (sender, receiver):
        async with handoff(sender, receiver, TARGET_IDS) as under_way:
            sent, received = await ship(under_way)
        assert [node.memory.content for node in receiver.nodes] == expected_memory(sender, receiver)
        assert sent.num_bytes == received.num_bytes == held_bytes(PAIRS[pair][1])
        assert sent.num_parts == received.num_parts
        assert {granted for of_flow in under_way.grants.values() for granted in of_flow} == {transport}


@pytest.mark.parametrize("flow", [0, 1])
async def test_a_transport_that_fails_in_one_flow_gives_way_in_that_one_alone(flow: int) -> None:
    async with workers(HEADS, HEADS, ["tcp", "grpc"]) as (sender, receiver):
        # Flow n goes from node n to node n.
        address = receiver.nodes[flow].hub.offers[0].address
        async with FaultProxy(address) as proxy, handoff(sender, receiver, TARGET_IDS) as under_way:
            proxy.cut_at = BLOCK_BYTES // 2
            sender.nodes[flow].senders.routes[address] = proxy
            sent, received = await ship(under_way)
            assert proxy.num_faults == 1
        assert under_way.grants == {flow: ["tcp", "grpc"], 1 - flow: ["tcp"]}
        assert [node.memory.content for node in receiver.nodes] == expected_memory(sender, receiver)
        assert sent.num_bytes == received.num_bytes == held_bytes(HEADS)


async def stalled(under_way: Handoff, proxies: Sequence[FaultProxy]) -> "asyncio.Task[TransferStats]":
    """Every flow in the middle of what it sends; the task that receives."""
    for proxy in proxies:
        # Over shm no KV passes, only where it lies.
        proxy.stall_at = 150 if "shm" in under_way.transports else BLOCK_BYTES
    receiving = asyncio.create_task(under_way.receive())
    under_way.offer(SOURCE_IDS)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(proxy.stalled.wait() for proxy in proxies))
    return receiving


@asynccontextmanager
async def proxied(sender: SpreadWorker, receiver: SpreadWorker) -> AsyncIterator[list[FaultProxy]]:
    """A proxy before each receiving node, for all senders."""
    addresses = [node.hub.offers[0].address for node in receiver.nodes]
    async with FaultProxy(addresses[0]) as one, FaultProxy(addresses[1]) as other:
        for node in sender.nodes:
            node.senders.routes |= dict(zip(addresses, (one, other), strict=True))
        yield [one, other]


@pytest.mark.parametrize("transport", ["shm", "tcp", "grpc"])
async def test_nobody_writes_once_the_receiver_has_left(transport: str) -> None:
    async with (
        workers(HEADS, HEADS, [transport]) as (sender, receiver),
        proxied(sender, receiver) as proxies,
        handoff(sender, receiver, TARGET_IDS) as under_way,
    ):
        receiving = await stalled(under_way, proxies)
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        assert receiving.cancelled()
        for node in receiver.nodes:
            node.memory.fill(range(NUM_BLOCKS), 0xEE)
        for proxy in proxies:
            proxy.resume()
        await asyncio.sleep(0.3)
        for node in receiver.nodes:
            assert node.memory.content == b"\xee" * (NUM_BLOCKS * BLOCK_BYTES)


@pytest.mark.parametrize("transport", ["shm", "tcp", "grpc"])
async def test_nobody_reads_once_the_sender_has_left(transport: str) -> None:
    async with workers(HEADS, HEADS, [transport]) as (sender, receiver), proxied(sender, receiver) as proxies:
        async with handoff(sender, receiver, TARGET_IDS) as under_way:
            receiving = await stalled(under_way, proxies)
            async with asyncio.timeout(PATIENCE_S):
                await under_way.departure.aclose()
            whole = expected_memory(sender, receiver)
            for node in sender.nodes:
                node.memory.fill(range(NUM_BLOCKS), 0xEE)
            for proxy in proxies:
                proxy.resume()
            with pytest.raises(UnavailableError) as told:
                await under_way.departure.wait()
            assert told.value.reason == "TRANSFER_ABORTED"
            await asyncio.sleep(0.1)
            # As the stream between the leaders would tell the receiver.
            receiving.cancel()
            (outcome,) = await asyncio.gather(receiving, return_exceptions=True)
            # All of it may have been under way already: then it is right.
            if isinstance(outcome, TransferStats):
                assert [node.memory.content for node in receiver.nodes] == whole
            else:
                assert isinstance(outcome, asyncio.CancelledError | MeshError)
        # Over shm the receiver reads, and may do so too late: its checksums tell.
        if transport != "shm":
            for node in receiver.nodes:
                assert bytes([0xEE]) * 64 not in node.memory.content


@pytest.mark.parametrize("steering", ["receiver", "sender"])
async def test_who_does_not_know_the_token_moves_nothing(steering: str) -> None:
    async with workers(HEADS, HEADS, ["tcp"]) as (sender, receiver):
        stranger = receiver if steering == "receiver" else sender
        stranger.known[1] = replace(stranger.known[1], token="guessed")
        async with handoff(sender, receiver, TARGET_IDS) as under_way:
            with pytest.raises(ExceptionGroup) as refused:
                await ship(under_way)
            # What a sender's node refuses with may be lost where the offer comes after it.
            assert any(isinstance(error, TicketError | UnavailableError) for error in refused.value.exceptions)
        assert not any(receiver.nodes[1].memory.content)


async def called(address: str, method: str, *requests: pb.ReceiveRequest | pb.SendRequest) -> grpc.StatusCode:
    """How a node ends a call that says this. What it answers before is read: gRPC tells a status only behind it."""
    channels = ChannelPool()
    call = getattr(kv_node_pb2_grpc.KVNodeStub(channels.get(address)), method)()
    try:
        async with asyncio.timeout(PATIENCE_S):
            for request in requests:
                await call.write(request)
            with suppress(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            return cast(grpc.StatusCode, await call.code())
    finally:
        call.cancel()
        await channels.aclose()


def receive_start(**said: object) -> pb.ReceiveRequest:
    fields: dict[str, object] = {
        "token": "token", "request_id": REQUEST_ID, "epoch": EPOCH, "sender_id": SENDER_ID,
        "sender_incarnation": INCARNATION, "block_ids": TARGET_IDS, "block_hashes": hashes(4),
        "run": kv_pb.BlockRun(offset_bytes=0, num_bytes=BLOCK_BYTES), "transports": ["tcp"],
    }  # fmt: skip
    return pb.ReceiveRequest(start=pb.ReceiveStart(**(fields | said)))  # type: ignore[arg-type]


def send_start(**said: object) -> pb.SendRequest:
    fields: dict[str, object] = {
        "token": "token", "request_id": REQUEST_ID, "receiver_id": "decode-0", "incarnation": INCARNATION,
        "run": kv_pb.BlockRun(offset_bytes=0, num_bytes=BLOCK_BYTES),
    }  # fmt: skip
    return pb.SendRequest(start=pb.SendStart(**(fields | said)))  # type: ignore[arg-type]


OUTSIDE = [
    kv_pb.BlockRun(offset_bytes=0, num_bytes=BLOCK_BYTES + 1),
    kv_pb.BlockRun(offset_bytes=1, num_bytes=BLOCK_BYTES),
    kv_pb.BlockRun(offset_bytes=BLOCK_BYTES, num_bytes=1),
    kv_pb.BlockRun(offset_bytes=2**64 - 1, num_bytes=2),
    kv_pb.BlockRun(offset_bytes=0, num_bytes=2**64 - 1),
    kv_pb.BlockRun(),
]


async def test_what_is_outside_of_the_memory_is_refused_before_anything_happens() -> None:
    denied, invalid = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT
    async with workers(WHOLE, HEADS, ["tcp"]) as (_, receiver):
        node, address = receiver.nodes[1], receiver.known[1].address
        for token in ("", "toke", "tokens", "tökén"):
            assert await called(address, "Receive", receive_start(token=token)) is denied
            assert await called(address, "Send", send_start(token=token)) is denied
        assert await called(address, "Receive", pb.ReceiveRequest(heartbeat=kv_pb.Heartbeat())) is denied
        assert await called(address, "Send", pb.SendRequest(offer=pb.SendOffer(last=True))) is denied
        for run in OUTSIDE:
            assert await called(address, "Receive", receive_start(run=run)) is invalid
            assert await called(address, "Send", send_start(run=run)) is invalid
        for wrong in (
            {"block_ids": [0, 1, 2, NUM_BLOCKS]},
            {"block_ids": [0, 1, 2, 2**32 - 1]},
            {"block_ids": [0, 1, 2, 2]},
            {"block_ids": [0, 1, 2]},
        ):
            assert await called(address, "Receive", receive_start(**wrong)) is invalid, wrong
        offers = [kv_pb.TransportOffer(name="tcp", address=node.hub.offers[0].address)]
        for block_ids, block_hashes in (([0, NUM_BLOCKS], hashes(2)), ([0], hashes(2)), ([0, 1], hashes(1))):
            offer = pb.SendRequest(offer=pb.SendOffer(block_ids=block_ids, block_hashes=block_hashes))
            assert await called(address, "Send", send_start(offers=offers), offer) is invalid
        assert node.hub.num_open_tickets == 0
        assert not any(node.memory.content)


async def test_a_node_that_cannot_be_reached_fails_both_ends_at_once() -> None:
    async with workers(HEADS, HEADS, ["tcp"]) as (sender, receiver):
        steering = receiver.nodes[1].steering
        assert steering is not None
        await steering.stop()
        async with handoff(sender, receiver, TARGET_IDS) as under_way:
            with pytest.raises(UnavailableError):
                async with asyncio.timeout(PATIENCE_S):
                    await under_way.receive()
        assert [receiver.known[1].address in reason for reason in receiver.lost] == [True]
        receiver.lost.clear()


async def test_a_prompt_that_nobody_is_to_receive_is_refused() -> None:
    async with workers(HEADS, HEADS, ["tcp"]) as (sender, _):
        with pytest.raises(InvalidRequestError, match="receiver"):
            sender.sending.departure((), REQUEST_ID, "decode-0", lambda *_: None)


async def test_a_sender_that_lacks_some_bytes_is_refused_before_a_grant() -> None:
    async with workers(HEADS[:1], WHOLE, ["tcp"]) as (sender, receiver):
        async with handoff(sender, receiver, TARGET_IDS) as under_way:
            with pytest.raises(PreconditionError) as refused:
                await under_way.receive()
        assert refused.value.reason == "KV_FLOWS"
        assert under_way.grants == {}


async def test_many_flows_leave_nothing_behind() -> None:
    def alive() -> list[object]:
        gc.collect()
        kept = (Shipment, Receipt, RemoteShipment, RemoteReceipt, ClientStream)
        return [found for found in gc.get_objects() if type(found) in kept]

    async with workers(HEADS, HEADS, ["tcp"]) as (sender, receiver):
        for number in range(20):
            async with handoff(sender, receiver, TARGET_IDS) as under_way:
                if number % 2:
                    await ship(under_way)
                else:
                    receiving = asyncio.create_task(under_way.receive())
                    under_way.offer(SOURCE_IDS[:2])
                    await asyncio.sleep(0.002 * number)
                    receiving.cancel()
                    await asyncio.gather(receiving, return_exceptions=True)
            if number == 1:
                num_tasks = len(asyncio.all_tasks())
        del under_way, receiving
        async with asyncio.timeout(PATIENCE_S):
            while alive() or len(asyncio.all_tasks()) > num_tasks:
                await asyncio.sleep(0.05)
