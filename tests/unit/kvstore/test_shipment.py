"""One request's KV on its way out, over real transports: grants that fail, grants that follow, and giving up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from kvstore.transfer import shipment
from kvstore.transfer.base import Grant
from kvstore.transfer.shipment import Shipment
from kvstore.transfer.transports import TRANSPORTS
from pdmesh.errors import MeshError, UnavailableError
from tests.fault_proxy import FaultProxy
from tests.kv_endpoints import REQUEST_ID, Endpoints, endpoints, hashes
from tests.kv_transfers import KIB, PATIENCE_S, give_up_after

NUM_BLOCKS = 8
BLOCK_BYTES = 64 * KIB


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass
class Shipping:
    """A shipment of all blocks of `ends`, and what it said of its grants."""

    ends: Endpoints
    shipment: Shipment
    failed: "asyncio.Queue[tuple[int, MeshError]]"

    def offer(self, num_blocks: int = NUM_BLOCKS) -> None:
        self.shipment.offer(range(num_blocks), hashes(num_blocks), last=num_blocks == NUM_BLOCKS)

    async def told(self) -> tuple[int, MeshError]:
        async with asyncio.timeout(PATIENCE_S):
            return await self.failed.get()


@asynccontextmanager
async def shipping(transport: str) -> AsyncIterator[Shipping]:
    failed: asyncio.Queue[tuple[int, MeshError]] = asyncio.Queue()
    async with endpoints(transport, NUM_BLOCKS, BLOCK_BYTES) as ends:
        under_way = Shipment(
            ends.source, ends.senders, REQUEST_ID, "decode-0", lambda number, error: failed.put_nowait((number, error))
        )
        async with aclosing(under_way):
            yield Shipping(ends, under_way, failed)
        assert failed.empty()


def forged(grant: Grant) -> Grant:
    return replace(grant, ticket=bytes(16))


async def test_blocks_leave_as_they_are_computed(transport: str) -> None:
    async with shipping(transport) as out, aclosing(out.ends.expect(range(NUM_BLOCKS))) as incoming:
        out.offer(2)
        out.shipment.granted(0, incoming.grant)
        async with asyncio.timeout(PATIENCE_S):
            while out.ends.target.read([0, 1]) != out.ends.source.read([0, 1]):
                await asyncio.sleep(0.01)
            for num_blocks in range(3, NUM_BLOCKS + 1):
                assert not any(out.ends.target.view(NUM_BLOCKS - 1))
                out.offer(num_blocks)
                await asyncio.sleep(0.001)
            sent, received = await out.shipment.wait(), await incoming.wait()
        assert (sent.num_bytes, sent.num_parts) == (received.num_bytes, received.num_parts)
        assert out.ends.target.content == out.ends.source.content


async def test_a_grant_that_is_refused_is_told_and_the_next_one_serves(transport: str) -> None:
    async with shipping(transport) as out, aclosing(out.ends.expect(range(NUM_BLOCKS))) as incoming:
        out.offer()
        for number in range(2):
            out.shipment.granted(number, forged(incoming.grant))
            failed, error = await out.told()
            assert failed == number
            assert error.reason in ("TICKET_UNKNOWN", "RECEIVER_LOST")
        out.shipment.granted(2, incoming.grant)
        async with asyncio.timeout(PATIENCE_S):
            await out.shipment.wait()
            await incoming.wait()
        assert out.ends.target.content == out.ends.source.content


async def test_a_grant_for_a_transport_that_is_not_ours_is_told(transport: str) -> None:
    async with shipping(transport) as out, aclosing(out.ends.expect(range(NUM_BLOCKS))) as incoming:
        out.shipment.granted(0, replace(incoming.grant, transport="pigeon"))
        number, error = await out.told()
        assert (number, error.reason) == (0, "NO_COMMON_TRANSPORT")


async def test_a_link_cut_midway_is_told_and_everything_is_sent_again(transport: str) -> None:
    async with (
        shipping(transport) as out,
        FaultProxy(out.ends.address) as proxy,
        aclosing(out.ends.expect(range(NUM_BLOCKS))) as first,
        aclosing(out.ends.expect(range(NUM_BLOCKS))) as second,
    ):
        out.offer(NUM_BLOCKS - 1)
        out.shipment.granted(0, replace(first.grant, address=proxy.address))
        async with asyncio.timeout(PATIENCE_S):
            while not any(out.ends.target.view(NUM_BLOCKS - 2)):
                await asyncio.sleep(0.01)
        proxy.cut_at = proxy.num_bytes + 10
        out.offer()
        assert (await out.told())[0] == 0
        assert proxy.num_faults == 1
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(UnavailableError):
                await first.wait()
            await first.aclose()
            out.ends.target.fill(range(NUM_BLOCKS), 0)
            out.shipment.granted(1, second.grant)
            await out.shipment.wait()
            await second.wait()
        assert out.ends.target.content == out.ends.source.content


async def test_a_new_grant_takes_the_place_of_one_that_hangs(transport: str) -> None:
    async with (
        shipping(transport) as out,
        FaultProxy(out.ends.address) as proxy,
        aclosing(out.ends.expect(range(NUM_BLOCKS))) as first,
        aclosing(out.ends.expect(range(NUM_BLOCKS))) as second,
    ):
        proxy.stall_at = 100
        out.offer()
        out.shipment.granted(0, replace(first.grant, address=proxy.address))
        async with asyncio.timeout(PATIENCE_S):
            await proxy.stalled.wait()
            await first.aclose()
            out.shipment.granted(1, second.grant)
            await out.shipment.wait()
            await second.wait()
        assert out.ends.target.content == out.ends.source.content


async def test_an_old_grant_that_comes_late_changes_nothing(transport: str) -> None:
    async with shipping(transport) as out, aclosing(out.ends.expect(range(NUM_BLOCKS))) as incoming:
        out.shipment.granted(1, incoming.grant)
        out.shipment.granted(0, forged(incoming.grant))
        out.offer()
        async with asyncio.timeout(PATIENCE_S):
            await out.shipment.wait()
            await incoming.wait()


async def test_given_up_at_any_moment_it_never_reads_its_blocks_again(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_reads = 0
    num_wholes = 0
    async with endpoints(transport, NUM_BLOCKS, BLOCK_BYTES) as ends:
        view = ends.source.view

        def counted(block_id: int) -> memoryview:
            nonlocal num_reads
            num_reads += 1
            return view(block_id)

        monkeypatch.setattr(ends.source, "view", counted)
        for step in range(40):
            async with aclosing(ends.expect(range(NUM_BLOCKS))) as incoming:
                out = Shipment(ends.source, ends.senders, REQUEST_ID, "decode-0", lambda *_: None)
                out.granted(0, incoming.grant)
                for num_blocks in range(1, NUM_BLOCKS + 1):
                    out.offer(range(num_blocks), hashes(num_blocks), last=num_blocks == NUM_BLOCKS)
                await asyncio.sleep(step * 0.0003)
                async with asyncio.timeout(PATIENCE_S):
                    await out.aclose()
                    num_reads_when_closed = num_reads
                    (outcome,) = await asyncio.gather(out.wait(), return_exceptions=True)
                    if isinstance(outcome, UnavailableError):
                        assert outcome.reason == "TRANSFER_ABORTED"
                    else:
                        num_wholes += 1
                        await incoming.wait()
                        assert ends.target.content == b"".join(bytes(view(block)) for block in range(NUM_BLOCKS))
                await asyncio.sleep(0.002)
                assert num_reads == num_reads_when_closed
        assert num_wholes < 40, "nothing was given up"


async def test_closing_waits_for_a_sender_in_the_middle_of_its_blocks(transport: str) -> None:
    async with (
        endpoints(transport, NUM_BLOCKS, 4 * 1024 * KIB) as ends,
        FaultProxy(ends.address) as proxy,
        aclosing(ends.expect(range(NUM_BLOCKS))) as incoming,
    ):
        proxy.stall_at = 300
        out = Shipment(ends.source, ends.senders, REQUEST_ID, "decode-0", lambda *_: None)
        out.granted(0, replace(incoming.grant, address=proxy.address))
        out.offer(range(NUM_BLOCKS), hashes(NUM_BLOCKS), last=True)
        async with asyncio.timeout(PATIENCE_S):
            await proxy.stalled.wait()
        async with asyncio.timeout(1.0):
            await out.aclose()
            await out.aclose()
        with pytest.raises(UnavailableError, match="gave the transfer up"):
            await out.wait()


@pytest.mark.parametrize("granted", [False, True])
async def test_a_receiver_that_falls_silent_is_given_up(
    granted: bool, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipment, "LEASE_S", 0.6)
    monkeypatch.setattr(shipment, "HEARTBEAT_S", 0.05)
    give_up_after(monkeypatch, 0.6)
    async with shipping(transport) as out, aclosing(out.ends.expect(range(NUM_BLOCKS))) as incoming:
        if granted:
            out.offer(1)
            out.shipment.granted(0, incoming.grant)
        for _ in range(8):
            # Signs of life count, for longer than one lease.
            await asyncio.sleep(0.1)
            out.shipment.alive()
        waiting = asyncio.create_task(out.shipment.wait())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(UnavailableError) as told:
                await waiting
        assert told.value.reason == "LEASE_EXPIRED"
