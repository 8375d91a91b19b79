"""All ways to move KV, in turns: how fast, and at what cost of processor time on both sides."""

import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.transfer.bare import BareSocket, move_by_stream
from bench.transfer.memory import PlainMemory
from bench.transfer.receiving import EPOCH, INCARNATION, REQUEST_ID, hashes, new_journal
from kvstore.transfer.base import Grant
from kvstore.transfer.senders import KVSenders
from kvstore.transfer.transports import TRANSPORTS
from pdmesh.channels import ChannelPool
from pdmesh.kv_memory import private_memory

_ROOT = Path(__file__).resolve().parents[2]
_GIB = 1 << 30
# What each transport is compared with: the same kind of connection.
YARDSTICKS = {"shm": "memcpy", "tcp": "bare tcp", "nixl": "bare tcp", "grpc": "bare grpc"}
# In processor time: memcpy has one side only, and brings nothing to another process.
CPU_YARDSTICKS = {**YARDSTICKS, "shm": "bare unix"}

# Moves the first blocks and returns the seconds that it took.
Way = Callable[[int], Awaitable[float]]


@dataclass(slots=True)
class Samples:
    """Of one way: seconds of the large move, processor seconds of both sides in it, seconds of the small ones."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    small_seconds: dict[str, list[float]] = field(default_factory=dict)

    def figures(self, num_bytes: int) -> dict[str, float]:
        small = {f"{name}_ms": 1e3 * statistics.median(times) for name, times in self.small_seconds.items()}
        return {
            "gib_per_s": num_bytes / _GIB / statistics.median(self.seconds),
            "cpu_s_per_gib": statistics.median(self.cpu_seconds) / (num_bytes / _GIB),
            **small,
        }


class Receiver:
    """The other process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the receiving process ended; what it says is above")
        reply: dict[str, Any] = json.loads(line)
        return reply

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        return await self.read()


@asynccontextmanager
async def _receiver(memory: PlainMemory) -> AsyncIterator[Receiver]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.transfer.receiving", str(memory.num_blocks), str(memory.block_bytes),
        cwd=_ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Receiver(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def measure(
    *, num_blocks: int, block_bytes: int, rounds: int, small: dict[str, int], on_round: Callable[[int], None]
) -> dict[str, dict[str, float]]:
    """Figures by way: GiB/s, processor seconds per GiB of both processes, and milliseconds of each small move.

    Args:
        small: Blocks of each, by name.
        on_round: Told as each round begins; round 0 warms up.
    """
    memory = PlainMemory(num_blocks, block_bytes, lend=True)
    async with contextlib.AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(_receiver(memory))
        ways = await _ways(stack, receiver, memory)
        samples = {name: Samples() for name in ways}
        for number in range(rounds + 1):
            on_round(number)
            for name, way in ways.items():
                sample = Samples() if not number else samples[name]
                for small_name, count in small.items():
                    sample.small_seconds.setdefault(small_name, []).append(await way(count))
                before = await _cpu_s(receiver)
                sample.seconds.append(await way(num_blocks))
                sample.cpu_seconds.append(await _cpu_s(receiver) - before)
    return {name: sample.figures(num_blocks * block_bytes) for name, sample in samples.items()}


async def _cpu_s(receiver: Receiver) -> float:
    """Of both processes."""
    reply: float = (await receiver.ask({"cpu": True}))["cpu_s"]
    return reply + time.process_time()


async def _ways(stack: contextlib.AsyncExitStack, receiver: Receiver, memory: PlainMemory) -> dict[str, Way]:
    addresses = await receiver.read()
    channels = ChannelPool()
    stack.push_async_callback(channels.aclose)
    senders = KVSenders(memory, INCARNATION, channels.get, new_journal())
    stack.push_async_callback(senders.aclose)
    copy = np.frombuffer(private_memory(memory.num_blocks * memory.block_bytes), np.uint8)

    async def memcpy(num_blocks: int) -> float:
        num_bytes = num_blocks * memory.block_bytes
        began = time.perf_counter()
        np.copyto(copy[:num_bytes], np.frombuffer(memory.bytes[:num_bytes], np.uint8))
        return time.perf_counter() - began

    def bare_socket(kind: str) -> Way:
        sock = BareSocket(kind, addresses[kind])
        stack.callback(sock.close)

        async def move(num_blocks: int) -> float:
            began = time.perf_counter()
            await asyncio.to_thread(sock.move, memory.bytes[: num_blocks * memory.block_bytes])
            return time.perf_counter() - began

        return move

    async def bare_grpc(num_blocks: int) -> float:
        began = time.perf_counter()
        await move_by_stream(channels.get(addresses["grpc"]), memory.bytes[: num_blocks * memory.block_bytes])
        return time.perf_counter() - began

    def transport(name: str) -> Way:
        async def move(num_blocks: int) -> float:
            reply = await receiver.ask({"expect": name, "blocks": num_blocks})
            grant = Grant(bytes.fromhex(reply["ticket"]), EPOCH, name, reply["address"])
            sender = senders.sender(grant, REQUEST_ID)
            try:
                began = time.perf_counter()
                await sender.open()
                await sender.send(0, range(num_blocks), hashes(num_blocks))
                await sender.finish()
                seconds = time.perf_counter() - began
            finally:
                await sender.aclose()
            arrived = (await receiver.ask({"wait": True}))["bytes"]
            assert arrived == num_blocks * memory.block_bytes
            return seconds

        return move

    bare: dict[str, Way] = {"memcpy": memcpy, "bare unix": bare_socket("unix"), "bare tcp": bare_socket("tcp")}
    return {**bare, "bare grpc": bare_grpc, **{name: transport(name) for name in TRANSPORTS}}
