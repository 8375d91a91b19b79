"""What a watcher makes of a directory, and announcer and watcher together, whatever happens to the store."""

import asyncio
import logging
import random
from dataclasses import replace

import pytest

from kvstore.announcer import MAX_EVENT_HASHES, Announcer
from kvstore.directory import (
    BlockEvent,
    BlockSnapshot,
    Directory,
    DirectoryUnavailableError,
)
from kvstore.memory_directory import MemoryDirectory
from kvstore.redis_directory import RedisDirectory
from kvstore.tiers.base import Tier
from kvstore.watcher import Watcher
from pdmesh.hashing import BlockHash
from pdmesh.types import Load, WorkerState
from tests.directory_stores import (
    CLUSTER,
    PATIENCE_S,
    REF,
    WORKER,
    Clock,
    Store,
    View,
    announcing,
    block,
    blocks,
    eventually,
    pool,
    watching,
)
from tests.valkey import ValkeyServer

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
    await directory.put_snapshot(REF, BlockSnapshot(0, pool(1)))
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
    await directory.put_snapshot(REF, BlockSnapshot(0, pool(1)))
    await directory.append_event(REF, BlockEvent(1, pool(2)))
    await watcher.poll()
    assert view.blocks[WORKER.worker_id] == set(blocks(1, 2))
    await directory.append_event(REF, BlockEvent(4, pool(5)))
    for _ in range(3):
        await watcher.poll()
    assert view.blocks[WORKER.worker_id] == set(blocks(1, 2)), "events 2 and 3 are missing: 4 may not be applied"
    assert view.num_resets == 1, "the snapshot is older than what was told: it may not be applied again"
    await directory.put_snapshot(REF, BlockSnapshot(3, pool(3, 4)))
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


async def test_the_nearest_tier_is_told(store: Store) -> None:
    ours, theirs, view = store.directory(), store.directory(), View()
    one, two, three = blocks(1, 2, 3)
    async with watching(theirs, view), announcing(ours) as announcer:

        async def shows(*tiers: Tier | None) -> None:
            held = {block: tier for block, tier in zip((one, two, three), tiers, strict=True) if tier is not None}
            await eventually(lambda: view.tiers.get(WORKER.worker_id) == held)
            late = View()
            async with watching(theirs, late):
                await eventually(lambda: late.tiers.get(WORKER.worker_id) == held)

        announcer.on_blocks([one, two], [])
        announcer.on_blocks([two, three], [], Tier.DISK)
        await shows(Tier.POOL, Tier.POOL, Tier.DISK)
        announcer.on_blocks([two, three], [], Tier.HOST)
        await shows(Tier.POOL, Tier.POOL, Tier.HOST)
        announcer.on_blocks([], [one, two])
        await shows(None, Tier.HOST, Tier.HOST)
        announcer.on_blocks([], [two, three], Tier.HOST)
        await shows(None, Tier.DISK, Tier.DISK)
        announcer.on_blocks([three], [])
        announcer.on_blocks([], [one, two, three], Tier.DISK)
        await shows(None, None, Tier.POOL)
    await ours.aclose()
    await theirs.aclose()


async def test_blocks_arrive_whatever_changes_and_fails(store: Store) -> None:
    ours, theirs, view = store.directory(), store.directory(), View()
    draw = random.Random(3)
    in_tier: dict[Tier, set[BlockHash]] = {tier: set() for tier in Tier}

    def nearest() -> dict[BlockHash, Tier]:
        return {block: tier for tier in (Tier.DISK, Tier.HOST, Tier.POOL) for block in in_tier[tier]}

    async with watching(theirs, view), announcing(ours) as announcer:
        for step in range(120):
            tier = draw.choice(list(Tier))
            held = in_tier[tier]
            removed = draw.sample(sorted(held), k=min(len(held), draw.randrange(4)))
            held.difference_update(removed)
            stored = [block(draw.randrange(60)) for _ in range(draw.randrange(6))]
            held.update(stored)
            announcer.on_blocks(stored, removed, tier)
            if step in (40, 80):
                store.go_down()
            if step in (60, 100):
                store.come_up_empty()
            await asyncio.sleep(0.005)
        await eventually(lambda: view.tiers.get(WORKER.worker_id) == nearest())
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


async def test_a_worker_may_start_and_stop_while_the_server_is_away(valkey: ValkeyServer) -> None:
    directory = RedisDirectory(valkey.url, CLUSTER)
    valkey.kill()
    async with asyncio.timeout(PATIENCE_S), announcing(directory) as announcer, watching(directory, View()) as watcher:
        announcer.on_blocks(blocks(1), ())
        assert not watcher.reachable
    await directory.aclose()
