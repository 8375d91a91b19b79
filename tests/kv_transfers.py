"""Whole transfers between the endpoints of a test, through a proxy or not, and what their ends are told."""

from collections.abc import Sequence
from contextlib import aclosing

import pytest

from kvstore.transfer import connection, states, tickets
from kvstore.transfer.base import KVSender
from pdmesh.errors import MeshError
from tests.fault_proxy import FaultProxy
from tests.kv_endpoints import Endpoints, hashes

# How long a test waits for what must happen at once; it fails only by never happening.
PATIENCE_S = 8.0
KIB, MIB = 1024, 1024 * 1024


async def send_all(sender: KVSender, num_blocks: int, first_hash: int = 0) -> None:
    """A whole transfer of the source's first blocks; their identities count from `first_hash` on."""
    async with aclosing(sender):
        await sender.open()
        await sender.send(0, range(num_blocks), hashes(num_blocks, first_hash))
        await sender.finish()


async def send_pieces(sender: KVSender, pieces: Sequence[tuple[int, Sequence[int]]]) -> None:
    """A whole transfer, of blocks by their first index."""
    async with aclosing(sender):
        await sender.open()
        for first_index, block_ids in pieces:
            await sender.send(first_index, block_ids, hashes(len(block_ids), first_index))
        await sender.finish()


def assert_told(error: MeshError, transport: str, reason: str) -> None:
    """What a refused sender learns: the reason; over gRPC perhaps only that the receiver has ended the transfer."""
    assert error.reason == reason or (transport == "grpc" and error.reason == "RECEIVER_LOST")


async def halfway(ends: Endpoints, proxy: FaultProxy, num_blocks: int) -> int:
    """The byte at the proxy at which the next transfer of so many blocks will be halfway, after one that is whole."""
    for _ in range(2):
        # The first one connects, which takes bytes of its own.
        begin = proxy.num_bytes
        async with aclosing(ends.expect(range(num_blocks))) as incoming:
            await send_all(ends.sender(incoming.grant, via=proxy.address), num_blocks)
            await incoming.wait()
    ends.target.fill(range(num_blocks), 0)
    return proxy.num_bytes + (proxy.num_bytes - begin) // 2


def give_up_after(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Shortens what is for peers that hang: leases, and how long a connection waits for bytes that it is owed."""
    monkeypatch.setattr(states, "LEASE_S", seconds)
    monkeypatch.setattr(tickets, "LEASE_S", seconds)
    monkeypatch.setattr(connection, "SILENCE_TIMEOUT_S", seconds)
