"""A store: who puts at once, when it is full, whose blocks it refuses, how it leaves, and what a kill leaves of it."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest

from kvstore.exchange.fetching import BlockFetcher
from kvstore.exchange.putting import BlockPutter
from kvstore.memory_directory import MemoryDirectory
from kvstore.store import servicer as store_servicer
from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from kvstore.store.servicer import PutServicer
from kvstore.tiers.config import TierConfig
from kvstore.transfer import streams
from kvstore.transfer.receiver import ReceiverHub
from pdmesh.channels import ChannelPool
from pdmesh.config import ServiceConfig
from pdmesh.errors import InvalidRequestError, MeshError, PreconditionError
from pdmesh.hashing import BlockHash
from pdmesh.local.child import ChildProcess, ChildSpec
from pdmesh.server import GrpcServer
from pdmesh.types import KVSource, PairingFacts
from pdmesh.v1 import cluster_pb2, cluster_pb2_grpc, kv_blocks_pb2, kv_blocks_pb2_grpc
from tests.directory_stores import eventually
from tests.fault_proxy import FaultProxy
from tests.kv_endpoints import BytesMemory, hashes, new_journal
from tests.kv_sources import ProxiedSenders
from tests.processes import kill
from tests.tier_blocks import FACTS
from tests.valkey import ValkeyServer

BLOCK_BYTES = 64 * 1024
_GIB = 1 << 30
EVERY_TRANSPORT = pytest.mark.parametrize("transport", ["shm", "tcp", "grpc"])


@dataclass
class Giver:
    """What a worker gives to stores with."""

    memory: BytesMemory
    senders: ProxiedSenders
    putter: BlockPutter

    async def put(
        self, address: str, block_hashes: Sequence[BlockHash], first: int = 0, facts: PairingFacts = FACTS
    ) -> int:
        """Puts blocks of the memory, from the `first` on, under these hashes; returns the bytes taken."""
        block_ids = range(first, first + len(block_hashes))
        return await self.putter.put("store-0", address, facts, self.memory, block_ids, block_hashes)


@asynccontextmanager
async def giver(name: str, transports: Sequence[str] = ("tcp", "grpc"), num_blocks: int = 64) -> AsyncIterator[Giver]:
    memory, channels = BytesMemory(num_blocks, BLOCK_BYTES, seed=3), ChannelPool()
    senders = ProxiedSenders(memory, f"{name}-1", channels.get, new_journal(), transports)
    try:
        yield Giver(memory, senders, BlockPutter(name, f"{name}-1", senders, channels))
    finally:
        await senders.aclose()
        await channels.aclose()


@asynccontextmanager
async def store(num_blocks: int, **tiers: object) -> AsyncIterator[StoreService]:
    """A store with room in memory for so many blocks; afterwards nothing of it is reserved or pinned."""
    sizes = {"kv_host_gib": num_blocks * BLOCK_BYTES / _GIB, **tiers}
    config = StoreConfig(ServiceConfig(), TierConfig(**sizes), "store-0")  # type: ignore[arg-type]
    service = StoreService(config, MemoryDirectory())
    try:
        await service.start()
        yield service
    finally:
        await service.close()
    if service.blocks.tiers is not None:
        service.blocks.tiers.host.check_invariants()
        service.blocks.tiers.host.check_idle()


async def held(service: StoreService, block_hashes: Sequence[BlockHash]) -> list[bytes]:
    """What the store would give of a run."""
    async with aclosing(await service.blocks.hold(block_hashes)) as slots:
        return [bytes(service.blocks.view(slot)) for slot in slots.block_ids]


@EVERY_TRANSPORT
async def test_two_workers_that_put_the_same_blocks_at_once(transport: str) -> None:
    async with store(64) as service, giver("a", [transport]) as a, giver("b", [transport]) as b:
        address = service.server.address
        await asyncio.gather(a.put(address, hashes(32)), b.put(address, hashes(32)))
        assert await held(service, hashes(32)) == [bytes(a.memory.view(n)) for n in range(32)]
        assert await b.put(address, hashes(32)) == 0, "took again what it has"
        assert service.hub.num_open_tickets == 0


async def test_a_full_store_makes_room_and_keeps_what_a_prompt_begins_with() -> None:
    async with store(24) as service, giver("a") as a:
        address = service.server.address
        await a.put(address, hashes(8))
        await a.put(address, hashes(16, first=100), first=8)
        # The oldest are those that this prompt begins with: without them, the rest is of no use to anybody.
        assert await a.put(address, hashes(16)) == 8 * BLOCK_BYTES
        assert len(await held(service, hashes(16))) == 16
        # And of the other prompt, its end made room.
        assert len(await held(service, hashes(16, first=100))) == 8


async def test_of_a_prompt_that_is_longer_than_the_store_the_beginning_is_kept() -> None:
    async with store(10) as service, giver("a") as a:
        address = service.server.address
        assert await a.put(address, hashes(4)) == 4 * BLOCK_BYTES
        assert await a.put(address, hashes(40)) == 6 * BLOCK_BYTES
        assert await held(service, hashes(40)) == [bytes(a.memory.view(n)) for n in range(10)]


async def test_a_store_that_takes_its_time_gets_the_blocks_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives signs of life before it says what it wants."""
    monkeypatch.setattr(streams, "HEARTBEAT_S", 0.02)
    take = PutServicer._take

    async def take_late(
        self: PutServicer,
        start: kv_blocks_pb2.PutStart,
        requests: AsyncIterator[kv_blocks_pb2.PutRequest],
        emit: Callable[[kv_blocks_pb2.PutResponse], None],
    ) -> None:
        await asyncio.sleep(0.1)
        await take(self, start, requests, emit)

    monkeypatch.setattr(PutServicer, "_take", take_late)
    async with store(8) as service, giver("a") as a:
        assert await a.put(service.server.address, hashes(4)) == 4 * BLOCK_BYTES


async def test_a_worker_that_hangs_before_it_sends_holds_no_slots_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_servicer, "LEASE_S", 0.1)
    async with store(8) as service, grpc.aio.insecure_channel(service.server.address) as channel:
        call = kv_blocks_pb2_grpc.KVStoreStub(channel).Put()
        start = kv_blocks_pb2.PutStart(
            request_id="r", sender_id="a", sender_incarnation="a-1", facts=FACTS.to_pb(), block_bytes=BLOCK_BYTES,
            block_hashes=hashes(4),
        )  # fmt: skip
        await call.write(kv_blocks_pb2.PutRequest(start=start))
        wanted: list[int] = []

        async def read() -> None:
            async for response in call:
                wanted.extend(response.wanted.indexes)

        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(read(), 5)
        assert wanted == [0, 1, 2, 3]
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        # `store` checks that nothing is reserved.


async def test_blocks_of_another_model_or_size_are_refused() -> None:
    async with store(8) as service, giver("a") as a:
        address = service.server.address
        await a.put(address, hashes(2))
        with pytest.raises(PreconditionError) as refused:
            await a.put(address, hashes(2, first=50), facts=replace(FACTS, model_digest="another"))
        assert refused.value.reason == "PAIRING_MISMATCH"
        a.memory.block_bytes //= 2
        with pytest.raises(PreconditionError, match=f"blocks of {BLOCK_BYTES} bytes, not {BLOCK_BYTES // 2}"):
            await a.put(address, hashes(2, first=50))
        a.memory.block_bytes *= 2
        assert not service.blocks.lacking(hashes(2))
        assert len(service.blocks.lacking(hashes(2, first=50))) == 2


async def test_a_hash_twice_is_the_callers_mistake() -> None:
    async with store(8) as service, giver("a") as a:
        with pytest.raises(InvalidRequestError, match="name each block hash once"):
            await a.put(service.server.address, hashes(1) * 2)


async def test_a_worker_that_leaves_in_the_middle_leaves_nothing_behind() -> None:
    async with store(32) as service, giver("a", ["tcp"]) as a:
        tcp = next(offer for offer in service.hub.offers if offer.name == "tcp")
        async with FaultProxy(tcp.address) as proxy:
            a.senders.proxy = proxy
            proxy.stall_at = 5 * BLOCK_BYTES
            putting = asyncio.create_task(a.put(service.server.address, hashes(32)))
            await asyncio.wait_for(proxy.stalled.wait(), 5)
            assert service.hub.num_open_tickets == 1
            putting.cancel()
            await asyncio.gather(putting, return_exceptions=True)
            await eventually(lambda: service.hub.num_open_tickets == 0 and not service.server.num_active_calls)
            proxy.resume()
            assert len(service.blocks.lacking(hashes(32))) == 32
            a.senders.proxy = None
            assert await a.put(service.server.address, hashes(32)) == 32 * BLOCK_BYTES


async def test_a_store_that_drains_lets_a_put_end() -> None:
    async with store(32) as service, giver("a", ["tcp"]) as a:
        tcp = next(offer for offer in service.hub.offers if offer.name == "tcp")
        async with FaultProxy(tcp.address) as proxy:
            a.senders.proxy = proxy
            proxy.stall_at = 5 * BLOCK_BYTES
            putting = asyncio.create_task(a.put(service.server.address, hashes(32)))
            await asyncio.wait_for(proxy.stalled.wait(), 5)
            draining = asyncio.create_task(service.drain())
            done, _ = await asyncio.wait([draining], timeout=0.1)
            assert not done, "it left in the middle of a put"
            assert not service.server.serving
            proxy.resume()
            assert await putting == 32 * BLOCK_BYTES
            await asyncio.wait_for(draining, 5)


@pytest.mark.e2e
async def test_a_killed_store_serves_what_was_whole_and_nothing_else(tmp_path: Path, unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    first, second = hashes(16), hashes(32, first=100)
    with ValkeyServer() as valkey:
        command = (
            *(sys.executable, "-m", "kvstore", "--store-id", "store-0", "--redis-url", valkey.url),
            *("--port", str(unused_tcp_port), "--kv-host-gib", "0.004"),
            *("--kv-disk-gib", "0.02", "--kv-disk-dir", str(tmp_path / "kv")),
        )
        process = ChildProcess(ChildSpec("store-0", command), tmp_path)
        try:
            await process.start()
            await _on_disk(address, 0)
            # Parts take the same way as the calls: a proxy can stand there before anything is granted.
            async with giver("a", ["grpc"]) as a, FaultProxy(address) as proxy:
                await a.put(address, first)
                await _on_disk(address, 16)
                a.senders.proxy = proxy
                proxy.stall_at = 5 * BLOCK_BYTES
                putting = asyncio.create_task(a.put(address, second, first=16))
                await asyncio.wait_for(proxy.stalled.wait(), 5)
                await kill(process)
                with pytest.raises(MeshError):
                    await putting
                a.senders.proxy = None
                await process.start()
                await _on_disk(address, 16)
                assert await _fetch(address, first) == [bytes(a.memory.view(n)) for n in range(16)]
                assert await _fetch(address, second) == []
                assert await a.put(address, first) == 0
                assert await a.put(address, second, first=16) == 32 * BLOCK_BYTES
                assert await _fetch(address, second) == [bytes(a.memory.view(n)) for n in range(16, 48)]
        finally:
            await process.stop(5)


async def _on_disk(address: str, num_blocks: int) -> None:
    """Returns when the store at `address` answers and has so many blocks on disk."""
    channels = ChannelPool()
    async with aclosing(channels), asyncio.timeout(20):
        stub = cluster_pb2_grpc.WorkerStub(channels.get(address))
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                status = await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=2)
                if status.info.load.num_disk_blocks == num_blocks:
                    return
            await asyncio.sleep(0.05)


async def _fetch(address: str, block_hashes: Sequence[BlockHash]) -> list[bytes]:
    """What the store at `address` gives of a run to somebody who has nothing of it."""
    target, server, channels = BytesMemory(64, BLOCK_BYTES), GrpcServer("127.0.0.1", 0), ChannelPool()
    hub = ReceiverHub(target, ["tcp"], server, "127.0.0.1", "127.0.0.1", new_journal())
    fetcher = BlockFetcher("b", hub, new_journal(), channels)
    reserved: list[int] = []

    async def reserve(num_blocks: int) -> list[int]:
        reserved.extend(range(num_blocks))
        return reserved

    await server.start()
    await hub.start()
    try:
        await fetcher.fetch(KVSource("store-0", "", address, 64), FACTS, block_hashes, 0, reserve)
    finally:
        await fetcher.aclose()
        await hub.aclose()
        await channels.aclose()
        await server.stop()
    return [bytes(target.view(block_id)) for block_id in reserved]
