"""What comes again, comes slowly, or was never meant for these blocks: refused, or waited for, on every transport."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from kvstore.transfer.senders import KVSenders
from pdmesh.channels import ChannelPool
from pdmesh.errors import CorruptionError, MeshError, TicketError, UnavailableError
from tests.fault_proxy import FaultProxy
from tests.kv_endpoints import INCARNATION, REQUEST_ID, BytesMemory, endpoints, new_journal
from tests.kv_transfers import KIB, PATIENCE_S, assert_told, send_all


async def test_a_replayed_connection_writes_nothing(transport: str) -> None:
    async with endpoints(transport, 2, KIB) as ends, FaultProxy(ends.address) as proxy:
        proxy.recording = True
        async with aclosing(ends.expect(range(2))) as incoming:
            await send_all(ends.sender(incoming.grant, via=proxy.address), 2)
            await incoming.wait()
            # The ticket is known still, but used; then it is forgotten.
            for _ in range(2):
                ends.target.fill(range(2), 0xAB)
                assert await proxy.replay(), "nothing was answered: was it received?"
                assert not set(ends.target.content) - {0xAB}
                await incoming.aclose()


@pytest.mark.parametrize("block_bytes", [KIB // 2, 2 * KIB])
async def test_blocks_of_another_shape_are_refused(transport: str, block_bytes: int) -> None:
    """Half the size, as of a narrower dtype; twice the size."""
    async with endpoints(transport, 4, KIB) as ends, aclosing(ends.expect([0, 1])) as incoming:
        other, channels = BytesMemory(4, block_bytes, seed=1), ChannelPool()
        senders = KVSenders(other, INCARNATION, channels.get, new_journal())
        try:
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises((CorruptionError, UnavailableError)):
                    await send_all(senders.sender(incoming.grant, REQUEST_ID), 2)
                with pytest.raises(CorruptionError):
                    await incoming.wait()
            assert not any(ends.target.read([2, 3]))
        finally:
            await senders.aclose()
            await channels.aclose()


async def test_blocks_of_other_tokens_are_refused(transport: str) -> None:
    async with endpoints(transport, 2, KIB) as ends, aclosing(ends.expect([0, 1])) as incoming:
        with pytest.raises((CorruptionError, UnavailableError)):
            await send_all(ends.sender(incoming.grant), 2, first_hash=7)
        with pytest.raises(CorruptionError) as told:
            await incoming.wait()
        assert told.value.reason == "KV_WRONG_BLOCK"


async def test_no_bit_of_a_ticket_can_be_guessed(transport: str) -> None:
    async with endpoints(transport, 1, KIB) as ends, aclosing(ends.expect([0])) as incoming:
        ticket = int.from_bytes(incoming.grant.ticket, "big")
        for bit in range(128):
            forged = replace(incoming.grant, ticket=(ticket ^ 1 << bit).to_bytes(16, "big"))
            with pytest.raises((TicketError, UnavailableError)) as refused:
                await send_all(ends.sender(forged), 1)
            assert_told(refused.value, transport, "TICKET_UNKNOWN")
        assert not any(ends.target.content)
        await send_all(ends.sender(incoming.grant), 1)


async def test_a_slow_link_is_no_fault_and_blocks_come_back_at_once(transport: str) -> None:
    async with endpoints(transport, 8, 256 * KIB) as ends, FaultProxy(ends.address) as proxy:
        proxy.bytes_per_s = 1e6
        async with aclosing(ends.expect(range(8))) as incoming:
            sending = asyncio.create_task(send_all(ends.sender(incoming.grant, via=proxy.address), 8))
            async with asyncio.timeout(PATIENCE_S):
                await incoming.wait()
                await sending
        assert ends.target.content == ends.source.content
        incoming = ends.expect(range(8))
        sending = asyncio.create_task(send_all(ends.sender(incoming.grant, via=proxy.address), 8))
        await asyncio.sleep(0.2)
        async with asyncio.timeout(1.0):
            await incoming.aclose()
        ends.target.fill(range(8), 0xAB)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait([sending])
        # Where the receiver pulls, the sender may have said all that it has to say.
        assert transport in ("shm", "nixl") or isinstance(sending.exception(), MeshError)
        assert not set(ends.target.content) - {0xAB}
