"""A node that is another process, and dies or stands still while KV moves: both ends give up soon, and the leader says
that it cannot know what the node still moves."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pdmesh.errors import MeshError
from pdmesh.types import KVNode
from tests.fault_proxy import FaultProxy
from tests.kv_nodes import BLOCK_BYTES, HEADS, TOKEN, WHOLE, SpreadWorker, handoff, spread_worker

START_TIMEOUT_S = 30.0
TARGET_IDS = [0, 7, 3, 11]
SOURCE_IDS = [5, 1, 9, 2]
# A node is given 2 s to end a flow; a busy machine some more.
GIVEN_UP_S = 3.5


@asynccontextmanager
async def with_child(
    worker: SpreadWorker, transport: str, *arguments: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The worker's second node, killed in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.kv_node_child", transport, *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            said = json.loads(await process.stdout.readline())
        worker.known.append(KVNode(HEADS[1], said["address"], TOKEN, tuple(map(tuple, said["offers"]))))
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_node_that_receives(fault: signal.Signals) -> None:
    async with (
        spread_worker(WHOLE, ["tcp"], seed=1) as sender,
        spread_worker(HEADS[:1], ["tcp"]) as receiver,
        with_child(receiver, "tcp") as child,
        FaultProxy(receiver.known[1].offers[0][1]) as proxy,
        handoff(sender, receiver, TARGET_IDS) as under_way,
    ):
        sender.nodes[0].senders.routes[receiver.known[1].offers[0][1]] = proxy
        proxy.stall_at = BLOCK_BYTES
        receiving = asyncio.create_task(under_way.receive())
        under_way.offer(SOURCE_IDS)
        async with asyncio.timeout(START_TIMEOUT_S):
            await proxy.stalled.wait()
        begun = time.monotonic()
        child.send_signal(fault)
        if fault is signal.SIGSTOP:
            # Its leader gives up for another reason: it does not wait for the node any longer than that.
            receiving.cancel()
        (outcome,) = await asyncio.gather(receiving, return_exceptions=True)
        assert isinstance(outcome, MeshError | asyncio.CancelledError)
        assert time.monotonic() - begun < GIVEN_UP_S
        assert [receiver.known[1].address in reason for reason in receiver.lost] == [True]
        assert sender.lost == []


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_node_that_sends(fault: signal.Signals) -> None:
    async with (
        spread_worker(HEADS[:1], ["tcp"], seed=1) as sender,
        spread_worker(WHOLE, ["tcp"]) as receiver,
        with_child(sender, "tcp", "2") as child,
        handoff(sender, receiver, TARGET_IDS) as under_way,
    ):
        receiving = asyncio.create_task(under_way.receive())
        under_way.offer(SOURCE_IDS[:2])
        async with asyncio.timeout(START_TIMEOUT_S):
            while receiver.nodes[0].journal.num_live < 2:
                await asyncio.sleep(0.01)
        begun = time.monotonic()
        child.send_signal(fault)
        if fault is signal.SIGKILL:
            with pytest.raises(MeshError):
                await under_way.departure.wait()
        await under_way.departure.aclose()
        assert time.monotonic() - begun < GIVEN_UP_S
        assert [sender.known[1].address in reason for reason in sender.lost] == [True]
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        assert receiver.lost == []
