"""Senders and receivers that are processes of their own, killed or stopped (SIGSTOP) at each point of a transfer."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from kvstore.transfer import shipment
from kvstore.transfer.base import Grant, TransferStats
from kvstore.transfer.senders import KVSenders
from kvstore.transfer.shipment import Shipment
from pdmesh.channels import ChannelPool
from pdmesh.errors import MeshError, UnavailableError
from tests.kv_child import BLOCK_BYTES, NUM_BLOCKS, Point
from tests.kv_endpoints import EPOCH, INCARNATION, REQUEST_ID, BytesMemory, endpoints, hashes, new_journal
from tests.kv_transfers import give_up_after

START_TIMEOUT_S = 30.0
GIVE_UP_AFTER_S = 1.0
AT_ONCE_S = 1.0
FOREIGN = 0xAB
# A process takes seconds to start: the point at which most is under way is always tested, all of them by `test-all`.
POINTS = [
    pytest.param(point, marks=() if point is Point.WITHIN_PART else pytest.mark.slow, id=point) for point in Point
]


class Child:
    """A running tests.kv_child."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> str:
        """What it prints next; empty at its end."""
        assert self._process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            return (await self._process.stdout.readline()).decode().strip()

    async def stopped(self) -> None:
        """Returns when it has stopped itself: the fault has happened."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while _state_of(self._process.pid) != "T":
                assert self._process.returncode is None, "it ended before its point"
                await asyncio.sleep(0.01)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


def _state_of(pid: int) -> str:
    """T: stopped; proc_pid_stat(5), where it follows the name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


@asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.kv_child", *arguments, stdout=asyncio.subprocess.PIPE
    )
    running = Child(process)
    try:
        yield running
    finally:
        await running.kill()


@asynccontextmanager
async def kept_alive(alive: Callable[[], None]) -> AsyncIterator[None]:
    """Gives signs of life while a process starts, for which leases are too short here."""

    async def beat() -> None:
        while True:
            alive()
            await asyncio.sleep(GIVE_UP_AFTER_S / 10)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    give_up_after(monkeypatch, GIVE_UP_AFTER_S)
    monkeypatch.setattr(shipment, "HEARTBEAT_S", GIVE_UP_AFTER_S / 10)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
async def test_a_sender(transport: str, point: Point, killed: bool) -> None:
    async with endpoints(transport, NUM_BLOCKS, BLOCK_BYTES) as ends:
        incoming = ends.expect(range(NUM_BLOCKS))
        grant = incoming.grant
        async with aclosing(incoming), child("send", point, transport, grant.address, grant.ticket.hex()) as sender:
            async with kept_alive(incoming.alive):
                await sender.stopped()
            begun = time.monotonic()
            if killed:
                await sender.kill()
            done, told = await _outcome(incoming.wait())
            # A kernel says at once that its process is gone, once it is known whose ticket its connection was for.
            noticed_at_once = killed and point is not Point.OPENING
            assert time.monotonic() - begun < AT_ONCE_S + (0.0 if noticed_at_once else GIVE_UP_AFTER_S)
            # What nixl reads, threads of the sender give; it may have stopped before they were done.
            if (transport, point) != ("nixl", Point.BEFORE_ACK):
                assert done == (point is Point.BEFORE_ACK), told
            begun = time.monotonic()
            await incoming.aclose()
            assert time.monotonic() - begun < AT_ONCE_S
            if done:
                assert ends.target.content == ends.source.content
            ends.target.fill(range(NUM_BLOCKS), FOREIGN)
            if not killed:
                sender.go_on()
            assert (await sender.line()).partition(" ")[0] == ("" if killed else "done" if done else "failed")
        await ends.stop_receiving()
        assert not set(ends.target.content) - {FOREIGN}, "a write landed after the blocks were given back"


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
async def test_a_receiver(transport: str, point: Point, killed: bool) -> None:
    source, channels = BytesMemory(NUM_BLOCKS, BLOCK_BYTES, seed=1), ChannelPool()
    senders = KVSenders(source, INCARNATION, channels.get, new_journal())
    told: asyncio.Queue[MeshError] = asyncio.Queue()
    try:
        async with child("receive", point, transport) as receiver:
            address, ticket = (await receiver.line()).split()
            shipping = Shipment(source, senders, REQUEST_ID, "decode-0", lambda _, error: told.put_nowait(error))
            async with aclosing(shipping):
                shipping.granted(0, Grant(bytes.fromhex(ticket), EPOCH, transport, address))
                half = NUM_BLOCKS // 2
                shipping.offer(range(half), hashes(half), last=False)
                shipping.offer(range(NUM_BLOCKS), hashes(NUM_BLOCKS), last=True)
                async with kept_alive(shipping.alive):
                    await receiver.stopped()
                begun = time.monotonic()
                if killed:
                    await receiver.kill()
                    async with asyncio.timeout(AT_ONCE_S):
                        await told.get()
                with pytest.raises(UnavailableError):
                    await shipping.wait()
                assert time.monotonic() - begun < GIVE_UP_AFTER_S + AT_ONCE_S
                begun = time.monotonic()
                await shipping.aclose()
                assert time.monotonic() - begun < AT_ONCE_S
            # These blocks are somebody else's from here on.
            source.fill(range(NUM_BLOCKS), FOREIGN)
            if not killed:
                receiver.go_on()
                # What the kernel held meanwhile may be all of it; then it is right.
                assert await receiver.line() != "done wrong"
    finally:
        await senders.aclose()
        await channels.aclose()


async def _outcome(waiting: Awaitable[TransferStats]) -> tuple[bool, str]:
    """Whether a transfer was done, and what was said of it if not."""
    try:
        stats = await waiting
    except UnavailableError as error:
        return False, error.reason
    return stats.num_bytes == NUM_BLOCKS * BLOCK_BYTES, ""
