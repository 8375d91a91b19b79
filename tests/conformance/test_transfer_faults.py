"""Bits flipped, bytes lost, doubled and out of order, wherever they strike: never a wrong block, and nobody is left
hanging. Ten thousand flips over all transports together, on transfers so small that every byte gets its turn."""

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from kvstore.transfer import places, shm, tcp
from kvstore.transfer.base import TransferStats
from kvstore.transfer.connection import Connection
from kvstore.transfer.frames import Frame
from kvstore.transfer.grpc_transport import GrpcSender
from kvstore.transfer.receiver import IncomingTransfer
from pdmesh.errors import MeshError
from tests.fault_proxy import FaultProxy, Rewrite, drop, flip, repeat, swap
from tests.kv_endpoints import Endpoints, endpoints
from tests.kv_transfers import give_up_after, send_pieces

# Ten thousand in all.
NUM_WIRE_FLIPS = {"shm": 4500, "tcp": 4500}
NUM_WIRE_FLIPS_ELSE = 500
NUM_MEMORY_FLIPS = 500
NUM_OTHER_FAULTS = 100
BLOCK_BYTES = 48
BLOCKS_EACH = 3
# Two parts.
PIECES = ((0, range(2)), (2, range(2, 3)))
# Transfers at once, each with a proxy: some faults leave both ends waiting for bytes that never come.
NUM_LANES = 24
GIVE_UP_AFTER_S = 0.25
# In which blocks are back, and both sides told, once one of them has ended.
AT_ONCE_S = 1.0
OWN, FOREIGN = 0xEE, 0xAB


class MessageFaults:
    """FaultProxy's rewriting for a transport of gRPC's: of the messages, whose frames are not ours."""

    def __init__(self) -> None:
        self.rewrite_at: int | None = None
        self.rewrite: Rewrite = flip(0)
        self.num_bytes = 0
        self.num_faults = 0

    def clear(self) -> None:
        self.rewrite_at = None

    def strike(self, sender: GrpcSender) -> None:
        write = sender._write

        async def write_rewritten(request: bytes) -> None:
            start, self.num_bytes = self.num_bytes, self.num_bytes + len(request)
            if self.rewrite_at is not None and start <= self.rewrite_at < self.num_bytes:
                at, self.rewrite_at = self.rewrite_at - start, None
                request = request[:at] + self.rewrite(request[at:])
                self.num_faults += 1
            await write(request)

        sender._write = write_rewritten  # type: ignore[method-assign]


@dataclass
class Lane:
    """A place for one transfer after the other: a sender's blocks, a receiver's, and the faults between them."""

    ends: Endpoints
    proxy: FaultProxy
    faults: FaultProxy | MessageFaults
    block_ids: range
    told: "Counter[str]" = field(default_factory=Counter)
    num_done: int = 0
    slowest_close_s: float = 0.0

    async def transfer(self) -> None:
        """One transfer; raises AssertionError where a promise was broken."""
        ends, block_ids = self.ends, self.block_ids
        ends.target.fill(block_ids, OWN)
        incoming = ends.expect(block_ids)
        pieces = [(first, [block_ids[place] for place in places]) for first, places in PIECES]
        sender = ends.sender(incoming.grant, via=self.proxy.address)
        if isinstance(sender, GrpcSender):
            assert isinstance(self.faults, MessageFaults)
            self.faults.strike(sender)
        sending = asyncio.create_task(send_pieces(sender, pieces))
        try:
            await self._check(incoming, sending)
        finally:
            sending.cancel()
            await asyncio.wait([sending])

    async def _check(self, incoming: IncomingTransfer, sending: "asyncio.Task[None]") -> None:
        ends, block_ids = self.ends, self.block_ids
        failure = await self._receive(incoming)
        if failure is None:
            self.num_done += 1
            assert ends.target.read(block_ids) == ends.source.read(block_ids), "a wrong block was committed"
        else:
            # The blocks are somebody else's from here on.
            ends.target.fill(block_ids, FOREIGN)
            self.told[failure.reason] += 1
        await self._end_sender(sending)
        error = sending.exception() if not sending.cancelled() else None
        if error is not None:
            assert isinstance(error, MeshError), f"no stated reason: {error!r}"
            assert error.reason
        elif not sending.cancelled():
            assert failure is None, f"the sender believes that it has succeeded: {failure}"
        if failure is not None:
            assert not set(ends.target.read(block_ids)) - {FOREIGN}, "a write landed after the blocks were given back"

    async def _receive(self, incoming: IncomingTransfer) -> MeshError | None:
        """What the receiver failed with; when it returns, the blocks are the receiver's alone."""
        failure: MeshError | None = None
        try:
            async with asyncio.timeout(GIVE_UP_AFTER_S + AT_ONCE_S):
                stats: TransferStats = await incoming.wait()
            assert stats.num_bytes == BLOCKS_EACH * BLOCK_BYTES
        except MeshError as error:
            failure = error
        finally:
            begun = time.monotonic()
            await incoming.aclose()
            self.slowest_close_s = max(self.slowest_close_s, time.monotonic() - begun)
        return failure

    async def _end_sender(self, sending: "asyncio.Task[None]") -> None:
        if self.ends.transport == "grpc":
            # A call that never reached the receiver, or is stuck in HTTP/2: the control stream tells the sender.
            await asyncio.wait([sending], timeout=GIVE_UP_AFTER_S)
            sending.cancel()
        await asyncio.wait([sending], timeout=GIVE_UP_AFTER_S + AT_ONCE_S)
        assert sending.done(), "the sender was left hanging"


@asynccontextmanager
async def lanes(transport: str) -> AsyncIterator[list[Lane]]:
    """Lanes whose blocks lie apart; between them lie blocks that are nobody's, and stay as they are."""
    stride = BLOCKS_EACH + 1
    async with endpoints(transport, NUM_LANES * stride, BLOCK_BYTES) as ends:
        ends.target.fill(range(NUM_LANES * stride), FOREIGN)
        all_lanes = []
        for number in range(NUM_LANES):
            proxy = await FaultProxy(ends.address).__aenter__()
            faults = MessageFaults() if transport == "grpc" else proxy
            all_lanes.append(Lane(ends, proxy, faults, range(number * stride, number * stride + BLOCKS_EACH)))
        try:
            yield all_lanes
        finally:
            for lane in all_lanes:
                await lane.proxy.__aexit__(None, None, None)
        between = ends.target.read(range(BLOCKS_EACH, NUM_LANES * stride, stride))
        assert not set(between) - {FOREIGN}, "a block outside the ticket was written"
        assert ends.hub.num_open_tickets == 0
        assert max(lane.slowest_close_s for lane in all_lanes) < AT_ONCE_S


async def in_all(all_lanes: list[Lane], num_faults: int, one: Callable[[Lane], Awaitable[None]]) -> None:
    """Runs `one` again and again in every lane until so many faults have happened."""

    async def run(lane: Lane) -> None:
        while sum(each.faults.num_faults for each in all_lanes) < num_faults:
            await one(lane)

    async with asyncio.TaskGroup() as group:
        for lane in all_lanes:
            group.create_task(run(lane))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    # One line for each transfer refused.
    caplog.set_level(logging.ERROR)


async def wire_sizes(transport: str) -> tuple[int, int]:
    """Bytes of one transfer at the proxy, connecting included: to the receiver, and back."""
    async with lanes(transport) as all_lanes:
        lane = all_lanes[0]
        await lane.transfer()
        assert lane.num_done == 1
        return lane.faults.num_bytes, lane.proxy.num_answer_bytes


async def test_bits_flipped_on_the_wire(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(f"flips {transport}")
    num_flips = NUM_WIRE_FLIPS.get(transport, NUM_WIRE_FLIPS_ELSE)
    num_bytes, num_answer_bytes = await wire_sizes(transport)
    give_up_after(monkeypatch, GIVE_UP_AFTER_S)
    async with lanes(transport) as all_lanes:
        num_descriptors = len(os.listdir("/proc/self/fd"))

        async def flip_one(lane: Lane) -> None:
            faults = lane.faults
            faults.rewrite = flip(draw.randrange(8))
            if isinstance(faults, FaultProxy) and draw.random() < 0.1:
                faults.rewrite_answer_at = faults.num_answer_bytes + draw.randrange(num_answer_bytes)
            else:
                faults.rewrite_at = faults.num_bytes + draw.randrange(num_bytes)
            await lane.transfer()
            faults.clear()

        await in_all(all_lanes, num_flips, flip_one)
        told = sum((lane.told for lane in all_lanes), Counter())
        # Some bits mean nothing, and a flipped answer comes too late to undo a transfer.
        assert told.total() > num_flips / 3
        assert told["KV_CORRUPTED"]
        # What a connection that was refused has opened is closed with it: no more than the lanes' idle ones.
        assert len(os.listdir("/proc/self/fd")) < num_descriptors + 8 * NUM_LANES


async def test_bits_flipped_in_the_sender_s_memory_after_its_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a sender reuses its blocks while a receiver that was held up still copies them."""
    draw = random.Random(0)
    # By the part with which it is due: of one transfer.
    flips: dict[int, tuple[memoryview, int, int]] = {}
    part_of_block_2 = next(number for number, (_, block_places) in enumerate(PIECES) if 2 in block_places)
    num_parts = 0
    send_crc, receive_places = tcp.send_crc, places.receive_places

    def flip_and_send(connection: Connection, crc: int) -> None:
        nonlocal num_parts
        if num_parts in flips:
            block, place, bit = flips[num_parts]
            block[place] ^= 1 << bit
        num_parts += 1
        send_crc(connection, crc)

    def receive_late(connection: Connection, frame: Frame, block_bytes: int, memory_bytes: int) -> tuple[int, ...]:
        received = receive_places(connection, frame, block_bytes, memory_bytes)
        # Until the checksum is here.
        connection.poll(None)
        return received

    monkeypatch.setattr(places, "send_crc", flip_and_send)
    monkeypatch.setattr(shm, "receive_places", receive_late)
    async with lanes("shm") as (lane, *_):
        for number in range(NUM_MEMORY_FLIPS):
            block = lane.ends.source.view(lane.block_ids[2])
            flips[part_of_block_2] = (block, draw.randrange(BLOCK_BYTES), draw.randrange(8))
            num_parts, before = 0, bytes(block)
            await lane.transfer()
            block[:] = before
            assert lane.told == {"KV_CORRUPTED": number + 1}
            assert lane.num_done == 0


@pytest.mark.parametrize("fault", ["lost", "doubled", "reordered"])
async def test_bytes_that_are(fault: str, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(f"{fault} {transport}")
    num_bytes, _ = await wire_sizes(transport)
    give_up_after(monkeypatch, GIVE_UP_AFTER_S)
    async with lanes(transport) as all_lanes:

        async def strike(lane: Lane) -> None:
            faults = lane.faults
            make = {"lost": drop, "doubled": repeat, "reordered": swap}[fault]
            faults.rewrite_at = faults.num_bytes + draw.randrange(num_bytes)
            faults.rewrite = make(draw.choice([1, 8, BLOCK_BYTES]))
            await lane.transfer()
            faults.clear()

        await in_all(all_lanes, NUM_OTHER_FAULTS, strike)
        assert sum(lane.told.total() for lane in all_lanes) > NUM_OTHER_FAULTS / 3


async def test_connections_cut_at_any_byte(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(f"cuts {transport}")
    async with lanes(transport) as all_lanes:
        await all_lanes[0].transfer()
        num_bytes = all_lanes[0].proxy.num_bytes
    give_up_after(monkeypatch, GIVE_UP_AFTER_S)
    async with lanes(transport) as all_lanes:

        async def cut(lane: Lane) -> None:
            lane.proxy.cut_at = lane.proxy.num_bytes + draw.randrange(num_bytes)
            await lane.transfer()
            lane.proxy.clear()

        async with asyncio.TaskGroup() as group:
            for lane in all_lanes:
                group.create_task(_repeat(cut, lane, NUM_OTHER_FAULTS // NUM_LANES))
        assert sum(lane.proxy.num_faults for lane in all_lanes) > NUM_OTHER_FAULTS / 3
        assert sum(lane.told.total() for lane in all_lanes) > NUM_OTHER_FAULTS / 3


async def _repeat(one: Callable[[Lane], Awaitable[None]], lane: Lane, num_times: int) -> None:
    for _ in range(num_times):
        await one(lane)
