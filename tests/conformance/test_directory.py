"""What every directory promises, in memory and on a real Valkey; and what only Redis can get wrong."""

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

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
from kvstore.redis_directory import RedisDirectory
from kvstore.tiers.base import Tier
from pdmesh.errors import ConfigError
from pdmesh.types import Load, Role, WorkerInfo, WorkerState
from tests.directory_stores import (
    CLUSTER,
    PATIENCE_S,
    REF,
    WORKER,
    Store,
    View,
    block,
    blocks,
    pool,
    watching,
)
from tests.valkey import ValkeyServer

# Registrations.


async def test_a_registration_is_read_as_it_was_written(directory: Directory) -> None:
    loading = WorkerInfo("decode-0", "b1", Role.DECODE, WorkerState.LOADING, "10.0.0.2:7000", loaded_bytes=5)
    await directory.put(WORKER)
    await directory.put(loading)
    found = sorted(await directory.registrations(), key=lambda registration: registration.ref)
    assert found == [Registration(WorkerRef.of(loading), loading), Registration(REF, WORKER)]


async def test_a_store_registers_like_a_worker(directory: Directory) -> None:
    store = replace(WORKER, worker_id="store-0", role=Role.STORE, model=None)
    await directory.put(store)
    assert await directory.registrations() == [Registration(WorkerRef.of(store), store)]


async def test_the_latest_heartbeat_counts(directory: Directory) -> None:
    await directory.put(WORKER)
    busy = replace(WORKER, load=Load(num_running=9), state=WorkerState.DRAINING)
    await directory.put(busy)
    assert await directory.registrations() == [Registration(REF, busy)]


async def test_removal_is_told(directory: Directory) -> None:
    await directory.put(WORKER)
    await directory.put_snapshot(REF, BlockSnapshot(0, pool(1)))
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
        await directory.put_snapshot(REF, BlockSnapshot(1, pool(1)))
        await directory.append_event(REF, BlockEvent(2, pool(2)))
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
        lambda: directory.append_event(REF, BlockEvent(1)),
        lambda: directory.put_snapshot(REF, BlockSnapshot(1)),
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
    await directory.put_snapshot(REF, BlockSnapshot(0))
    assert await directory.put(WORKER) is True
    assert await directory.put(replace(WORKER, incarnation="a2")) is False
    store.go_down()
    store.come_up_empty()
    restarted = store.directory()
    assert await restarted.put(WORKER) is False
    await restarted.aclose()


async def test_events_are_read_in_order_from_where_one_left_off(directory: Directory) -> None:
    other = WorkerRef("decode-0", "b1")
    stored = {Tier.POOL: blocks(3), Tier.HOST: blocks(2, 4), Tier.DISK: blocks(5)}
    first, second, third = BlockEvent(1, pool(1, 2)), BlockEvent(2, stored, blocks(1)), BlockEvent(7, {}, blocks(9))
    await directory.append_event(REF, first)
    await directory.append_event(REF, second)
    await directory.append_event(other, third)
    assert await directory.events({REF: 0, other: 6}) == {REF: [first, second], other: [third]}
    assert await directory.events({REF: 1, other: 7}) == {REF: [second]}
    assert await directory.events({REF: 2}) == {}
    assert await directory.events({WorkerRef("prefill-0", "a2"): 0}) == {}
    assert await directory.events({}) == {}


async def test_a_read_is_bounded_and_old_events_go(directory: Directory) -> None:
    num_events = 2 * MAX_EVENTS
    for seq in range(1, num_events + 1):
        await directory.append_event(REF, BlockEvent(seq, pool(seq)))
    found = (await directory.events({REF: 0}))[REF]
    assert len(found) == MAX_EVENTS_PER_READ
    assert found[0].seq > 1, "the oldest are gone, and the reader can see it"
    latest = (await directory.events({REF: num_events - 2}))[REF]
    assert [event.seq for event in latest] == [num_events - 1, num_events]


async def test_the_latest_snapshot_counts(directory: Directory) -> None:
    assert await directory.snapshot(REF) is None
    tiered = BlockSnapshot(4, {Tier.POOL: blocks(1, 2), Tier.HOST: blocks(4), Tier.DISK: blocks(5, 6)})
    await directory.put_snapshot(REF, tiered)
    assert await directory.snapshot(REF) == tiered
    await directory.put_snapshot(REF, BlockSnapshot(6, {Tier.HOST: blocks(3)}))
    assert await directory.snapshot(REF) == BlockSnapshot(6, {Tier.HOST: blocks(3)})
    await directory.put_snapshot(REF, BlockSnapshot(7))
    assert await directory.snapshot(REF) == BlockSnapshot(7)


# Redis alone.


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


async def test_foreign_and_corrupt_values_are_skipped_with_one_line(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    directory, redis = RedisDirectory(valkey.url, CLUSTER), Redis.from_url(valkey.url)
    prefix = f"pdmesh:{CLUSTER}:"
    future_role = WORKER.to_pb()
    future_role.worker_id = "future"
    future_role.role = 99  # type: ignore[assignment]
    await directory.put(WORKER)
    await directory.append_event(REF, BlockEvent(1, pool(1)))
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
        assert await directory.events({REF: 0, odd: 0}) == {REF: [BlockEvent(1, pool(1))]}
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
    await directory.put_snapshot(REF, BlockSnapshot(0, pool(1)))
    await directory.append_event(REF, BlockEvent(1, pool(2)))
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


async def test_a_hash_takes_sixteen_bytes_whatever_its_tier(valkey: ValkeyServer) -> None:
    """Against the raw keys: what the module says of them is what other programs read."""
    directory, redis = RedisDirectory(valkey.url, CLUSTER), Redis.from_url(valkey.url)
    held = {Tier.POOL: blocks(1, 2), Tier.DISK: blocks(3)}
    await directory.put_snapshot(REF, BlockSnapshot(5, held))
    await directory.append_event(REF, BlockEvent(6, held, blocks(4)))
    packed = {b"p": block(1) + block(2), b"h": b"", b"d": block(3)}
    assert await redis.hgetall(f"pdmesh:{CLUSTER}:snapshot:prefill-0:a1") == {b"seq": b"5", **packed}
    entries = await redis.xrange(f"pdmesh:{CLUSTER}:events:prefill-0:a1")
    assert entries == [(b"6-0", {**packed, b"r": block(4)})]
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
