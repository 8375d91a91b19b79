"""What every directory promises, in memory and on a real Valkey; and what announcer and watcher make of it."""

import asyncio
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import psutil
import pytest
from redis.asyncio import Redis

from kvstore.announcer import MAX_EVENT_HASHES, Announcer
from kvstore.directory import (
    MAX_EVENTS,
    MAX_EVENTS_PER_READ,
    BlockEvent,
    BlockSnapshot,
    Directory,
    DirectoryUnavailableError,
    Registration,
    WorkerRef,
)
from kvstore.memory_directory import MemoryDirectory
from kvstore.redis_directory import RedisDirectory
from kvstore.watcher import Watcher
from pdmesh.errors import ConfigError
from pdmesh.hashing import BlockHash
from pdmesh.types import Load, ModelInfo, PairingFacts, Role, WorkerInfo, WorkerState
from tests.valkey import ValkeyServer

CLUSTER = "test"
# How long a test waits for what must happen soon; it fails only by never happening.
PATIENCE_S = 10.0

FACTS = PairingFacts("digest", "float32", "float32", 16, 2, 1, 8, "layer,kv,head,token,dim")
WORKER = WorkerInfo(
    worker_id="prefill-0", incarnation="a1", role=Role.PREFILL, state=WorkerState.READY, address="10.0.0.1:7000",
    facts=FACTS, model=ModelInfo("tiny", "llama", 1000, 512), load=Load(1, 2, 3, 100, 90),
)  # fmt: skip
REF = WorkerRef.of(WORKER)


def block(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


def blocks(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(block(number) for number in numbers)


class Store(Protocol):
    """Where directories keep what they are told; can be made to fail."""

    def directory(self, ttl_s: float = 3.0) -> Directory: ...
    def go_down(self) -> None: ...
    def come_up_empty(self) -> None: ...


class MemoryStore:
    def __init__(self) -> None:
        self._directory: MemoryDirectory | None = None

    def directory(self, ttl_s: float = 3.0) -> MemoryDirectory:
        if self._directory is None:
            self._directory = MemoryDirectory(ttl_s)
        return self._directory

    def go_down(self) -> None:
        self.directory().reachable = False

    def come_up_empty(self) -> None:
        self.directory().lose_everything()
        self.directory().reachable = True


class ValkeyStore:
    def __init__(self, server: ValkeyServer) -> None:
        self.server = server

    def directory(self, ttl_s: float = 3.0) -> RedisDirectory:
        return RedisDirectory(self.server.url, CLUSTER, ttl_s)

    def go_down(self) -> None:
        self.server.kill()

    def come_up_empty(self) -> None:
        self.server.start()


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture(params=["memory", "valkey"])
def store(request: pytest.FixtureRequest) -> Store:
    return MemoryStore() if request.param == "memory" else ValkeyStore(request.getfixturevalue("valkey"))


@pytest.fixture
async def directory(store: Store) -> AsyncIterator[Directory]:
    directory = store.directory()
    yield directory
    await directory.aclose()


class View:
    """A listener that keeps what a router would, and what it was told in order."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerInfo] = {}
        self.seen: list[WorkerInfo] = []
        self.blocks: dict[str, set[BlockHash]] = {}
        self.gone: list[tuple[str, str]] = []
        self.num_resets = 0

    def worker_seen(self, info: WorkerInfo) -> None:
        self.workers[info.worker_id] = info
        self.seen.append(info)
        self.blocks.setdefault(info.worker_id, set())

    def worker_gone(self, worker_id: str, incarnation: str, reason: str) -> None:
        assert self.workers.pop(worker_id).incarnation == incarnation
        assert reason
        del self.blocks[worker_id]
        self.gone.append((worker_id, incarnation))

    def blocks_stored(self, worker_id: str, hashes: Sequence[BlockHash]) -> None:
        self.blocks[worker_id].update(hashes)

    def blocks_removed(self, worker_id: str, hashes: Sequence[BlockHash]) -> None:
        self.blocks[worker_id].difference_update(hashes)

    def blocks_reset(self, worker_id: str, hashes: Sequence[BlockHash]) -> None:
        self.blocks[worker_id] = set(hashes)
        self.num_resets += 1


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def announcing(directory: Directory, info: WorkerInfo = WORKER) -> AsyncIterator[Announcer]:
    announcer = Announcer(directory, lambda: info, heartbeat_s=0.1)
    await announcer.start()
    try:
        yield announcer
    finally:
        await announcer.stop()


@asynccontextmanager
async def watching(directory: Directory, view: View) -> AsyncIterator[Watcher]:
    watcher = Watcher(directory, view, poll_s=0.02)
    await watcher.start()
    try:
        yield watcher
    finally:
        await watcher.stop()


# Registrations.


async def test_a_registration_is_read_as_it_was_written(directory: Directory) -> None:
    loading = WorkerInfo("decode-0", "b1", Role.DECODE, WorkerState.LOADING, "10.0.0.2:7000", loaded_bytes=5)
    await directory.put(WORKER)
    await directory.put(loading)
    found = sorted(await directory.registrations(), key=lambda registration: registration.ref)
    assert found == [Registration(WorkerRef.of(loading), loading), Registration(REF, WORKER)]


async def test_the_latest_heartbeat_counts(directory: Directory) -> None:
    await directory.put(WORKER)
    busy = replace(WORKER, load=Load(num_running=9), state=WorkerState.DRAINING)
    await directory.put(busy)
    assert await directory.registrations() == [Registration(REF, busy)]


async def test_removal_is_told(directory: Directory) -> None:
    await directory.put(WORKER)
    await directory.put_snapshot(REF, 0, blocks(1))
    await directory.remove(REF)
    assert await directory.registrations() == [Registration(REF, None)]
    assert await directory.snapshot(REF) is None


async def test_removal_leaves_a_successor_alone(directory: Directory) -> None:
    successor = replace(WORKER, incarnation="a2")
    await directory.put(WORKER)
    await directory.put(successor)
    await directory.remove(REF)
    assert await directory.registrations() == [Registration(WorkerRef.of(successor), successor)]


async def test_everything_of_a_silent_worker_expires(store: Store) -> None:
    directory = store.directory(ttl_s=0.3)
    try:
        await directory.put(WORKER)
        await directory.put_snapshot(REF, 1, blocks(1))
        await directory.append_events(REF, 2, blocks(2), ())
        assert await directory.registrations()
        async with asyncio.timeout(PATIENCE_S):
            while await directory.registrations() or await directory.snapshot(REF) or await directory.events({REF: 0}):
                await asyncio.sleep(0.02)
    finally:
        await directory.aclose()


async def test_an_outage_is_one_error(store: Store, directory: Directory) -> None:
    await directory.put(WORKER)
    store.go_down()
    for call in (
        lambda: directory.put(WORKER),
        lambda: directory.remove(REF),
        lambda: directory.registrations(),
        lambda: directory.append_events(REF, 1, (), ()),
        lambda: directory.put_snapshot(REF, 1, ()),
        lambda: directory.events({REF: 0}),
        lambda: directory.snapshot(REF),
    ):
        with pytest.raises(DirectoryUnavailableError):
            await call()
    store.come_up_empty()
    assert await directory.registrations() == []
    assert await directory.put(WORKER) is False
    assert await directory.registrations() == [Registration(REF, WORKER)]


# Blocks.


async def test_a_heartbeat_says_whether_the_snapshot_is_there(store: Store, directory: Directory) -> None:
    assert await directory.put(WORKER) is False
    await directory.put_snapshot(REF, 0, ())
    assert await directory.put(WORKER) is True
    assert await directory.put(replace(WORKER, incarnation="a2")) is False
    store.go_down()
    store.come_up_empty()
    restarted = store.directory()
    assert await restarted.put(WORKER) is False
    await restarted.aclose()


async def test_events_are_read_in_order_from_where_one_left_off(directory: Directory) -> None:
    other = WorkerRef("decode-0", "b1")
    await directory.append_events(REF, 1, blocks(1, 2), ())
    await directory.append_events(REF, 2, blocks(3), blocks(1))
    await directory.append_events(other, 7, (), blocks(9))
    first, second = BlockEvent(1, blocks(1, 2)), BlockEvent(2, blocks(3), blocks(1))
    assert await directory.events({REF: 0, other: 6}) == {REF: [first, second], other: [BlockEvent(7, (), blocks(9))]}
    assert await directory.events({REF: 1, other: 7}) == {REF: [second]}
    assert await directory.events({REF: 2}) == {}
    assert await directory.events({WorkerRef("prefill-0", "a2"): 0}) == {}
    assert await directory.events({}) == {}


async def test_a_read_is_bounded_and_old_events_go(directory: Directory) -> None:
    num_events = 2 * MAX_EVENTS
    for seq in range(1, num_events + 1):
        await directory.append_events(REF, seq, blocks(seq), ())
    found = (await directory.events({REF: 0}))[REF]
    assert len(found) == MAX_EVENTS_PER_READ
    assert found[0].seq > 1, "the oldest are gone, and the reader can see it"
    latest = (await directory.events({REF: num_events - 2}))[REF]
    assert [event.seq for event in latest] == [num_events - 1, num_events]


async def test_the_latest_snapshot_counts(directory: Directory) -> None:
    assert await directory.snapshot(REF) is None
    await directory.put_snapshot(REF, 4, blocks(1, 2))
    await directory.put_snapshot(REF, 6, blocks(3))
    assert await directory.snapshot(REF) == BlockSnapshot(6, blocks(3))
    await directory.put_snapshot(REF, 7, ())
    assert await directory.snapshot(REF) == BlockSnapshot(7)


# Watching, poll by poll.


async def test_a_watcher_tells_what_is_new_and_what_changed_once(directory: Directory) -> None:
    view = View()
    watcher = Watcher(directory, view)
    await directory.put(WORKER)
    await watcher.poll()
    await watcher.poll()
    busy = replace(WORKER, load=Load(num_running=5))
    await directory.put(busy)
    await watcher.poll()
    assert view.seen == [WORKER, busy]


async def test_absence_counts_only_while_the_directory_answers(store: Store, directory: Directory) -> None:
    view, clock = View(), Clock()
    watcher = Watcher(directory, view, poll_s=1.0, expiry_s=5.0, clock=clock)
    await directory.put(WORKER)
    await watcher.poll()
    reachable = [watcher.reachable]
    store.go_down()
    for _ in range(100):
        clock.now += 1.0
        await watcher.poll()
    reachable.append(watcher.reachable)
    assert watcher.age_s(WORKER.worker_id) == pytest.approx(100.0)
    store.come_up_empty()
    for _ in range(5):
        clock.now += 1.0
        await watcher.poll()
    assert [*reachable, watcher.reachable] == [True, False, True]
    assert view.workers == {WORKER.worker_id: WORKER}, "four seconds of answered time: not gone yet"
    clock.now += 1.0
    await watcher.poll()
    assert view.gone == [(WORKER.worker_id, WORKER.incarnation)]
    assert watcher.age_s(WORKER.worker_id) == float("inf")


async def test_a_watcher_that_was_held_up_does_not_blame_the_workers() -> None:
    directory, view, clock = MemoryDirectory(), View(), Clock()
    watcher = Watcher(directory, view, poll_s=0.25, expiry_s=5.0, clock=clock)
    await directory.put(WORKER)
    await watcher.poll()
    directory.lose_everything()
    clock.now += 1000.0
    await watcher.poll()
    assert watcher.reachable
    assert not view.gone


async def test_a_removed_worker_is_gone_at_the_next_poll(directory: Directory) -> None:
    view, clock = View(), Clock()
    watcher = Watcher(directory, view, clock=clock)
    await directory.put(WORKER)
    await watcher.poll()
    await directory.remove(REF)
    await watcher.poll()
    assert view.gone == [(WORKER.worker_id, WORKER.incarnation)]
    assert not view.workers


async def test_a_new_incarnation_replaces_the_old_for_good(directory: Directory) -> None:
    view, clock = View(), Clock()
    watcher = Watcher(directory, view, clock=clock)
    successor = replace(WORKER, incarnation="a2", address="10.0.0.1:7001")
    await directory.put(WORKER)
    await directory.put_snapshot(REF, 0, blocks(1))
    await watcher.poll()
    assert view.blocks == {WORKER.worker_id: set(blocks(1))}
    await directory.put(successor)
    await watcher.poll()
    assert view.gone == [(WORKER.worker_id, "a1")]
    assert view.workers == {WORKER.worker_id: successor}
    assert view.blocks == {WORKER.worker_id: set()}
    # The old one was only stopped, and writes once more: nobody believes it.
    await directory.put(WORKER)
    await watcher.poll()
    assert view.workers == {WORKER.worker_id: successor}
    assert len(view.gone) == 1


async def test_a_gap_in_events_is_bridged_by_a_later_snapshot_only(directory: Directory) -> None:
    view = View()
    watcher = Watcher(directory, view)
    await directory.put(WORKER)
    await directory.put_snapshot(REF, 0, blocks(1))
    await directory.append_events(REF, 1, blocks(2), ())
    await watcher.poll()
    assert view.blocks[WORKER.worker_id] == set(blocks(1, 2))
    await directory.append_events(REF, 4, blocks(5), ())
    for _ in range(3):
        await watcher.poll()
    assert view.blocks[WORKER.worker_id] == set(blocks(1, 2)), "events 2 and 3 are missing: 4 may not be applied"
    assert view.num_resets == 1, "the snapshot is older than what was told: it may not be applied again"
    await directory.put_snapshot(REF, 3, blocks(3, 4))
    await watcher.poll()
    assert view.blocks[WORKER.worker_id] == set(blocks(3, 4, 5))
    assert view.num_resets == 2


async def test_a_watcher_that_comes_late_sees_all_blocks(directory: Directory) -> None:
    async with announcing(directory) as announcer:
        announcer.on_blocks(blocks(1, 2, 3), ())
        announcer.on_blocks(blocks(4), blocks(1))
        view = View()
        async with watching(directory, view):
            await eventually(lambda: view.blocks[WORKER.worker_id] == set(blocks(2, 3, 4)))


# Announcer and watcher together.


async def test_a_worker_comes_changes_and_leaves(store: Store) -> None:
    ours, theirs, view = store.directory(), store.directory(), View()
    info = replace(WORKER, state=WorkerState.LOADING)
    announcer = Announcer(ours, lambda: info, heartbeat_s=60.0)
    async with watching(theirs, view):
        await announcer.start()
        await eventually(lambda: view.workers == {WORKER.worker_id: info})
        info = WORKER
        # The next heartbeat is a minute away: only the kick can tell.
        announcer.kick()
        await eventually(lambda: view.workers == {WORKER.worker_id: WORKER})
        await announcer.stop()
        await announcer.stop()
        await eventually(lambda: view.gone == [(WORKER.worker_id, WORKER.incarnation)])
    await ours.aclose()
    await theirs.aclose()


async def test_blocks_arrive_whatever_changes_and_fails(store: Store) -> None:
    ours, theirs, view = store.directory(), store.directory(), View()
    draw = random.Random(3)
    held: set[BlockHash] = set()
    async with watching(theirs, view), announcing(ours) as announcer:
        for step in range(120):
            removed = draw.sample(sorted(held), k=min(len(held), draw.randrange(4)))
            held.difference_update(removed)
            stored = [block(draw.randrange(200)) for _ in range(draw.randrange(6))]
            held.update(stored)
            announcer.on_blocks(stored, removed)
            if step in (40, 80):
                store.go_down()
            if step in (60, 100):
                store.come_up_empty()
            await asyncio.sleep(0.005)
        await eventually(lambda: view.blocks.get(WORKER.worker_id) == held)
        assert not view.gone
    await ours.aclose()
    await theirs.aclose()


async def test_more_changes_than_an_event_holds(store: Store) -> None:
    ours, theirs, view = store.directory(), store.directory(), View()
    many = [block(number) for number in range(3 * MAX_EVENT_HASHES)]
    async with watching(theirs, view), announcing(ours) as announcer:
        announcer.on_blocks(many, ())
        await eventually(lambda: view.blocks.get(WORKER.worker_id) == set(many))
        announcer.on_blocks((), many[1:])
        await eventually(lambda: view.blocks.get(WORKER.worker_id) == {many[0]})
    await ours.aclose()
    await theirs.aclose()


async def test_a_store_restarted_empty_is_whole_again_and_nobody_vanishes(store: Store) -> None:
    ours, theirs, view, late = store.directory(), store.directory(), View(), View()
    async with watching(theirs, view) as watcher, announcing(ours) as announcer:
        announcer.on_blocks(blocks(1, 2), ())
        await eventually(lambda: view.blocks.get(WORKER.worker_id) == set(blocks(1, 2)))
        store.go_down()
        await eventually(lambda: not watcher.reachable)
        announcer.on_blocks(blocks(3), blocks(1))
        store.come_up_empty()
        async with asyncio.timeout(5.0):
            await eventually(lambda: watcher.reachable and view.blocks.get(WORKER.worker_id) == set(blocks(2, 3)))
            async with watching(theirs, late):
                await eventually(lambda: late.blocks.get(WORKER.worker_id) == set(blocks(2, 3)))
        assert not view.gone
        assert view.workers == {WORKER.worker_id: WORKER}
    await ours.aclose()
    await theirs.aclose()


async def test_an_outage_is_logged_once_on_each_side(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs, view = store.directory(), store.directory(), View()
    async with watching(theirs, view) as watcher, announcing(ours) as announcer:
        with caplog.at_level(logging.INFO, "kvstore"):
            store.go_down()
            await eventually(lambda: not watcher.reachable)
            for _ in range(10):
                announcer.kick()
                await asyncio.sleep(0.06)
            store.come_up_empty()
            await eventually(lambda: sum("again" in record.message for record in caplog.records) == 2)
    assert sum("unreachable" in record.message for record in caplog.records) == 2
    await ours.aclose()
    await theirs.aclose()


# Valkey alone.


async def test_a_stopped_server_does_not_hold_anybody_up(valkey: ValkeyServer) -> None:
    ours, theirs, view = RedisDirectory(valkey.url, CLUSTER), RedisDirectory(valkey.url, CLUSTER), View()
    async with watching(theirs, view) as watcher, announcing(ours) as announcer:
        await eventually(lambda: view.workers == {WORKER.worker_id: WORKER})
        valkey.pause()
        try:
            await eventually(lambda: not watcher.reachable)
            assert valkey.state == "T"
            announcer.on_blocks(blocks(1), ())
            fresh = RedisDirectory(valkey.url, CLUSTER)
            async with asyncio.timeout(3.0):
                for directory in (ours, fresh):
                    with pytest.raises(DirectoryUnavailableError):
                        await directory.registrations()
            await fresh.aclose()
            assert view.workers == {WORKER.worker_id: WORKER}, "the last view stands"
        finally:
            valkey.resume()
        await eventually(lambda: view.blocks[WORKER.worker_id] == set(blocks(1)))
        assert not view.gone
    await ours.aclose()
    await theirs.aclose()


async def test_a_call_can_be_cancelled_at_any_moment(valkey: ValkeyServer) -> None:
    directory = RedisDirectory(valkey.url, CLUSTER)
    for num_steps in range(200):
        writing = asyncio.create_task(_write_for_ever(directory))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        writing.cancel()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait([writing])
        assert writing.cancelled()
    await directory.put(WORKER)
    assert await directory.registrations() == [Registration(REF, WORKER)]
    await directory.aclose()


async def _write_for_ever(directory: Directory) -> None:
    while True:
        await directory.put(WORKER)
        await directory.registrations()


async def test_a_worker_may_start_and_stop_while_the_server_is_away(valkey: ValkeyServer) -> None:
    directory = RedisDirectory(valkey.url, CLUSTER)
    valkey.kill()
    async with asyncio.timeout(PATIENCE_S), announcing(directory) as announcer, watching(directory, View()) as watcher:
        announcer.on_blocks(blocks(1), ())
        assert not watcher.reachable
    await directory.aclose()


async def test_foreign_and_corrupt_values_are_skipped_with_one_line(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    directory, redis = RedisDirectory(valkey.url, CLUSTER), Redis.from_url(valkey.url)
    prefix = f"pdmesh:{CLUSTER}:"
    future_role = WORKER.to_pb()
    future_role.worker_id = "future"
    future_role.role = 99  # type: ignore[assignment]
    await directory.put(WORKER)
    await directory.append_events(REF, 1, blocks(1), ())
    await redis.sadd(f"{prefix}workers", "garbage", "list", "renamed", "future", b"\xff\xfe")
    await redis.set(f"{prefix}worker:garbage", b"\xff\x00 not a protobuf")
    await redis.rpush(f"{prefix}worker:list", "a")
    await redis.set(f"{prefix}worker:renamed", WORKER.to_pb().SerializeToString())
    await redis.set(f"{prefix}worker:future", future_role.SerializeToString())
    await redis.xadd(f"{prefix}events:prefill-0:a1", {"other": "field"}, id="2-0")
    await redis.hset(f"{prefix}snapshot:prefill-0:a1", mapping={"seq": "one", "hashes": b"short"})
    odd = WorkerRef("odd", "o1")
    await redis.set(f"{prefix}events:odd:o1", "a string")
    await redis.set(f"{prefix}snapshot:odd:o1", "a string")
    for _ in range(3):
        assert await directory.registrations() == [Registration(REF, WORKER)]
        assert await directory.events({REF: 0, odd: 0}) == {REF: [BlockEvent(1, blocks(1))]}
        assert await directory.snapshot(REF) is None
        assert await directory.snapshot(odd) is None
    skipped = [record.message.split()[1].rstrip(",") for record in caplog.records if "skipping" in record.message]
    expected = ("worker:garbage", "worker:renamed", "worker:future", "events:prefill-0:a1", "snapshot:prefill-0:a1",
                "events:odd:o1", "snapshot:odd:o1")  # fmt: skip
    assert sorted(skipped) == sorted(prefix + key for key in expected)
    await redis.aclose()
    await directory.aclose()


async def test_nothing_of_a_killed_worker_stays_in_redis(valkey: ValkeyServer) -> None:
    directory = RedisDirectory(valkey.url, CLUSTER, ttl_s=0.3)
    redis = Redis.from_url(valkey.url)
    await directory.put(WORKER)
    await directory.put_snapshot(REF, 0, blocks(1))
    await directory.append_events(REF, 1, blocks(2), ())
    keys = sorted(map(_text, await redis.keys()))
    assert len(keys) == 4
    for key in keys:
        assert key.startswith(f"pdmesh:{CLUSTER}:")
        assert await redis.pttl(key) > 0 or key.endswith(":workers"), f"{key} would stay for ever"
    async with watching(directory, View()), asyncio.timeout(PATIENCE_S):
        while await redis.keys():
            await asyncio.sleep(0.02)
    await redis.aclose()
    await directory.aclose()


def _text(key: bytes | str) -> str:
    return key.decode() if isinstance(key, bytes) else key


async def test_clusters_on_one_redis_do_not_meet(valkey: ValkeyServer) -> None:
    ours, theirs = RedisDirectory(valkey.url, "one"), RedisDirectory(valkey.url, "two")
    await ours.put(WORKER)
    assert await theirs.registrations() == []
    await ours.aclose()
    await theirs.aclose()


def test_a_malformed_url_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="redis://host:port/0"):
        RedisDirectory("localhost:6379", CLUSTER)


def test_the_server_does_not_outlive_a_killed_test(tmp_path: Path) -> None:
    script = "from tests.valkey import ValkeyServer as V; v = V(); v.start(); print(v.pid, flush=True); input()"
    root = Path(__file__).parents[2]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        assert "valkey" in server.name()
        parent.kill()
    # Whoever adopts it may leave it a zombie.
    deadline = time.monotonic() + PATIENCE_S
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server lives on"
        time.sleep(0.01)
