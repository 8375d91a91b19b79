"""Prefixes that are brought: once for all who want them, from nobody who cannot give them, and with the same tokens."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.api import EngineRequest
from engine.config import EngineConfig
from engine.local_engine import LocalEngine
from kvstore.exchange.fetching import FIND_TIMEOUT_S, BlockFetcher
from kvstore.exchange.servicer import SERVICE, FetchServicer
from kvstore.tiers.host import HostTier
from kvstore.tiers.stack import TierStack
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.senders import KVSenders
from pdmesh.channels import ChannelPool
from pdmesh.hashing import BlockHash
from pdmesh.sampling import SamplingParams
from pdmesh.server import GrpcServer
from pdmesh.types import KVSource
from pdmesh.v1 import kv_blocks_pb2_grpc
from tests.directory_stores import eventually
from tests.fault_proxy import FaultProxy, flip
from tests.kv_endpoints import new_journal
from tests.kv_sources import SOURCE_ID, promising_source, source
from tests.tiny_models import VOCAB_SIZE
from worker.costs import Speeds
from worker.prefixes import Prefixes
from worker.shelf import EngineShelf

SIZE = 16
NUM_FULL = 24
NUM_BLOCKS = 96
# Seconds for a prompt token: dear enough to bring whatever can be brought.
TOKEN_S = 5e-4
SAMPLING = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def prompt(seed: int) -> list[int]:
    return [(seed * 31 + 7 * i * i) % (VOCAB_SIZE - 64) for i in range(NUM_FULL * SIZE + 5)]


class GatedTiers(TierStack):
    """Tiers that load slowly: not before `gate` is set. `loading` is set once somebody waits for it."""

    def __init__(self, host: HostTier) -> None:
        super().__init__(host)
        self.loading = threading.Event()
        self.gate = threading.Event()
        self.num_loads = 0

    def load(self, hashes: Sequence[BlockHash], views: Sequence[memoryview]) -> int:
        self.num_loads += 1
        self.loading.set()
        assert self.gate.wait(10)
        return super().load(hashes, views)


@dataclass
class Worker:
    """An engine, what it brings prefixes with, and its blocks for others to fetch."""

    engine: LocalEngine
    tiers: GatedTiers
    journal: TransferJournal
    hub: ReceiverHub
    prefixes: Prefixes
    server: GrpcServer

    @property
    def kv(self) -> KVSource:
        return KVSource("other", "other-1", self.server.address, NUM_FULL)

    async def answer(self, tokens: list[int], cache_salt: bytes = b"") -> tuple[list[int], int]:
        """The tokens after a prompt, and how many of its own were cached."""
        request = EngineRequest(f"{time.monotonic_ns()}", tuple(tokens), SAMPLING, cache_salt)
        outputs = self.engine.generate(request)
        answer: list[int] = []
        num_cached = 0
        async for output in outputs:
            answer += output.token_ids
            num_cached = output.num_cached_tokens
        return answer, num_cached

    def memory(self) -> bytes:
        return b"".join(bytes(self.engine.memory.view(block_id)) for block_id in range(NUM_BLOCKS))

    async def assert_right_and_idle(self, tokens: list[int], num_cached: int) -> None:
        """The prompt begins with so many cached tokens and gets the tokens that it gets computed; nothing is held."""
        await eventually(lambda: self.engine.status().num_leases == 0)
        answer, found = await self.answer(tokens)
        assert found == num_cached
        assert answer == (await self.answer(tokens, b"computed"))[0]
        await eventually(lambda: self.engine.status().num_free_blocks == NUM_BLOCKS)
        assert self.engine.status().num_leases == 0
        assert self.hub.num_open_tickets == self.journal.num_live == 0
        self.hub.check_invariants()
        self.tiers.host.check_idle()


@asynccontextmanager
async def worker(
    model: Path, worker_id: str, transports: Sequence[str] = ("shm", "tcp", "grpc")
) -> AsyncIterator[Worker]:
    engine = LocalEngine(
        EngineConfig(str(model), "float32", num_blocks=NUM_BLOCKS, max_model_len=512, num_threads=1), lend_kv=True
    )
    journal, channels, server = new_journal(), ChannelPool(), GrpcServer("127.0.0.1", 0)
    async with AsyncExitStack() as exit_stack:
        await engine.start(lambda done, total: None)
        exit_stack.push_async_callback(engine.close)
        exit_stack.push_async_callback(channels.aclose)
        tiers = GatedTiers(HostTier(400, engine.memory.block_bytes))
        tiers.gate.set()
        engine.keep_evicted(tiers.put)
        hub = ReceiverHub(engine.memory, transports, server, "127.0.0.1", "127.0.0.1", journal)
        fetcher = BlockFetcher(worker_id, hub, journal, channels)
        prefixes = Prefixes(engine, lambda: tiers, fetcher, Speeds(lambda: TOKEN_S))
        senders = KVSenders(engine.memory, f"{worker_id}-1", channels.get, journal)
        shelf = EngineShelf(engine, lambda: engine.facts, prefixes)
        servicer = FetchServicer(shelf, f"{worker_id}-1", senders)
        server.add(kv_blocks_pb2_grpc.add_KVBlocksServicer_to_server, servicer, SERVICE)
        await server.start()
        exit_stack.push_async_callback(senders.aclose)
        exit_stack.push_async_callback(server.stop)
        await hub.start()
        exit_stack.push_async_callback(hub.aclose)
        exit_stack.push_async_callback(fetcher.aclose)
        yield Worker(engine, tiers, journal, hub, prefixes, server)


@pytest.fixture
async def here(tiny_model: Path) -> AsyncIterator[Worker]:
    async with worker(tiny_model, "here") as made:
        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source is waited for as long as a machine may stand still that has more to do."""
    monkeypatch.setattr("kvstore.exchange.fetching.FIND_TIMEOUT_S", 10.0)
    monkeypatch.setattr("worker.prefixes._PATIENCE_S", 10.0)


async def evict(made: Worker, tokens: list[int]) -> None:
    """Computes a prompt and then others, until none of its blocks is in the cache: they lie in the tiers."""
    await made.answer(tokens)
    for seed in range(100, 105):
        await made.answer(prompt(seed))
    lease = await made.engine.acquire_prefix(tokens, b"")
    await made.engine.release(lease)
    assert lease.num_cached_blocks == 0
    assert made.tiers.host.stats().num_stored >= NUM_FULL


async def test_two_prompts_with_one_beginning_load_it_once(here: Worker) -> None:
    tokens = prompt(1)
    await evict(here, tokens)
    here.tiers.gate.clear()
    bringing = [asyncio.create_task(here.prefixes.bring([*tokens, n], b"")) for n in range(3)]
    await asyncio.to_thread(here.tiers.loading.wait, 5)
    done, _ = await asyncio.wait(bringing, timeout=0.1)
    assert not done, "somebody did not wait for the blocks"
    here.tiers.gate.set()
    await asyncio.gather(*bringing)
    assert here.tiers.num_loads == 1
    await here.assert_right_and_idle(tokens, NUM_FULL * SIZE)


async def test_a_load_that_is_cancelled_writes_nothing_afterwards_and_another_takes_over(here: Worker) -> None:
    tokens = prompt(1)
    await evict(here, tokens)
    here.tiers.gate.clear()
    first = asyncio.create_task(here.prefixes.bring(tokens, b""))
    await asyncio.to_thread(here.tiers.loading.wait, 5)
    second = asyncio.create_task(here.prefixes.bring(tokens, b""))
    first.cancel()
    done, _ = await asyncio.wait([first], timeout=0.1)
    assert not done, "the blocks were given back while a thread could still write to them"
    here.tiers.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert here.tiers.num_loads == 2
    await here.assert_right_and_idle(tokens, NUM_FULL * SIZE)


@pytest.mark.usefixtures("patient")
async def test_another_worker_gives_what_lies_in_its_tiers(tiny_model: Path, here: Worker) -> None:
    tokens = prompt(1)
    async with worker(tiny_model, "other") as other:
        await evict(other, tokens)
        await asyncio.gather(*(here.prefixes.bring(tokens, b"", [other.kv]) for _ in range(2)))
        assert other.tiers.num_loads == 1
        received = [total for total in here.journal.report().totals if total.direction.value == "receiving"]
        assert [(total.num_done, total.num_bytes) for total in received] == [
            (1, NUM_FULL * here.engine.memory.block_bytes)
        ]
        await here.assert_right_and_idle(tokens, NUM_FULL * SIZE)
        await eventually(lambda: other.engine.status().num_leases == 0)


async def test_blocks_that_a_tier_lost_since_it_was_asked_are_computed(here: Worker) -> None:
    tokens = prompt(1)
    await evict(here, tokens)
    here.tiers.gate.clear()
    bringing = asyncio.create_task(here.prefixes.bring(tokens, b""))
    await asyncio.to_thread(here.tiers.loading.wait, 5)
    # All of host memory is taken, and given back empty.
    here.tiers.host.release(here.tiers.host.reserve(400))
    here.tiers.gate.set()
    await bringing
    assert here.tiers.num_loads == 1
    await here.assert_right_and_idle(tokens, 0)


@asynccontextmanager
async def dead() -> AsyncIterator[KVSource]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield KVSource(SOURCE_ID, "gone", f"127.0.0.1:{port}", NUM_FULL)


@asynccontextmanager
async def black_hole() -> AsyncIterator[KVSource]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield KVSource(SOURCE_ID, "silent", f"127.0.0.1:{listener.getsockname()[1]}", NUM_FULL)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (dead, "UNAVAILABLE"),
        (black_hole, "UNAVAILABLE"),
        (lambda: promising_source(NUM_FULL), "SOURCE_SLOW"),
        # Far more than was asked for, and than the cache could ever hold.
        (lambda: promising_source(100_000), "SOURCE_SLOW"),
    ],
    ids=["dead", "a black hole", "slow", "a liar"],
)
async def test_who_cannot_give_is_given_up_and_not_asked_again_at_once(
    here: Worker, caplog: pytest.LogCaptureFixture, kind: object, reason: str
) -> None:
    tokens = prompt(1)

    def reasons() -> list[str]:
        return [record.__dict__["reason"] for record in caplog.records if record.name == "worker.prefixes"]

    async with kind() as kv:  # type: ignore[operator]
        began = time.monotonic()
        await here.prefixes.bring(tokens, b"", [kv])
        assert time.monotonic() - began < FIND_TIMEOUT_S + 2.0
        assert reasons() == [reason]
        await here.prefixes.bring(tokens, b"", [kv])
        assert reasons() == [reason], "asked it again"
    await here.assert_right_and_idle(tokens, 0)


@pytest.mark.usefixtures("patient")
async def test_a_worker_that_loads_still_has_nothing_and_says_so(
    tiny_model: Path, here: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    loading = LocalEngine(EngineConfig(str(tiny_model), "float32"))
    server = GrpcServer("127.0.0.1", 0)
    async with AsyncExitStack() as exit_stack:
        channels = await exit_stack.enter_async_context(aclosing(ChannelPool()))
        senders = KVSenders(here.engine.memory, "loading-1", channels.get, new_journal())
        servicer = FetchServicer(EngineShelf(loading, lambda: None, here.prefixes), "loading-1", senders)
        server.add(kv_blocks_pb2_grpc.add_KVBlocksServicer_to_server, servicer, SERVICE)
        await server.start()
        exit_stack.push_async_callback(server.stop)
        await here.prefixes.bring(prompt(1), b"", [KVSource("loading", "loading-1", server.address, NUM_FULL)])
    assert [record.__dict__["reason"] for record in caplog.records if record.name == "worker.prefixes"] == [
        "WORKER_LOADING"
    ]
    await here.assert_right_and_idle(prompt(1), 0)


@pytest.mark.usefixtures("patient")
async def test_who_has_less_than_the_router_said_gives_nothing(here: Worker) -> None:
    tokens = prompt(1)
    async with source(here.engine.facts, here.engine.memory.block_bytes, 0) as other:
        await here.prefixes.bring(tokens, b"", [other.kv])
        assert other.shelf.holding.is_set()
    await here.assert_right_and_idle(tokens, 0)


@pytest.mark.usefixtures("patient")
async def test_corrupt_bytes_are_not_used(tiny_model: Path) -> None:
    tokens = prompt(1)
    async with worker(tiny_model, "here", ["tcp"]) as here:
        block_bytes = here.engine.memory.block_bytes
        async with (
            FaultProxy(here.hub.offers[0].address) as proxy,
            source(here.engine.facts, block_bytes, NUM_FULL, ["tcp"]) as other,
        ):
            other.senders.proxy = proxy
            proxy.rewrite_at, proxy.rewrite = 5 * block_bytes, flip(0)
            await here.prefixes.bring(tokens, b"", [other.kv])
            assert proxy.num_faults == 1
            (failure,) = here.journal.report().failures
            assert failure.outcome.value == "corrupted"
        await here.assert_right_and_idle(tokens, 0)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("end", ["cancel", "restart"])
async def test_nothing_writes_once_a_fetch_has_ended_in_its_middle(tiny_model: Path, end: str) -> None:
    tokens = prompt(1)
    async with worker(tiny_model, "here", ["tcp"]) as here:
        facts, block_bytes = here.engine.facts, here.engine.memory.block_bytes
        async with (
            FaultProxy(here.hub.offers[0].address) as proxy,
            source(facts, block_bytes, NUM_FULL, ["tcp"]) as other,
        ):
            other.senders.proxy = proxy
            proxy.stall_at = 5 * block_bytes
            bringing = asyncio.create_task(here.prefixes.bring(tokens, b"", [other.kv]))
            await asyncio.wait_for(proxy.stalled.wait(), 20)
            assert here.engine.status().num_leases == 1
            if end == "cancel":
                bringing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await bringing
                assert bringing.cancelled()
            else:
                await other.server.stop()
                await bringing
            before = here.memory()
            proxy.resume()
            await asyncio.sleep(0.1)
            assert here.memory() == before
        await here.assert_right_and_idle(tokens, 0)


@pytest.mark.usefixtures("patient")
async def test_a_source_that_was_restarted_has_nothing_and_says_so(tiny_model: Path, here: Worker) -> None:
    tokens = prompt(1)
    async with worker(tiny_model, "other") as restarted:
        stale = KVSource("other", "before", restarted.server.address, NUM_FULL)
        await here.prefixes.bring(tokens, b"", [stale])
        await here.assert_right_and_idle(tokens, 0)
        # What it computes from then on is as good as ever, whatever incarnation the router remembers.
        await restarted.answer(prompt(2))
        await here.prefixes.bring(prompt(2), b"", [stale])
        await here.assert_right_and_idle(prompt(2), NUM_FULL * SIZE)
