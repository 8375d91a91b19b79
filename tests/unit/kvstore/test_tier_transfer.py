"""The transfer service sends from host memory and receives into it, as it does with an engine's memory."""

from contextlib import AsyncExitStack, aclosing

import pytest

from kvstore.tiers.host import HostTier
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.senders import KVSenders
from kvstore.transfer.transports import TRANSPORTS
from pdmesh.channels import ChannelPool
from pdmesh.server import GrpcServer
from tests.kv_endpoints import new_journal
from tests.tier_blocks import BLOCK_BYTES, block, key, keys


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_blocks_travel_from_one_host_memory_into_another(transport: str) -> None:
    numbers = range(1, 6)
    source, target = HostTier(8, BLOCK_BYTES), HostTier(8, BLOCK_BYTES)
    for n in reversed(numbers):
        source.put(key(n), block(n))
    pinned = list(source.pin(keys(*numbers)).values())
    reserved = target.reserve(len(pinned))
    async with AsyncExitStack() as exit_stack:
        server = GrpcServer("127.0.0.1", 0)
        hub = ReceiverHub(target, [transport], server, "127.0.0.1", "127.0.0.1", new_journal())
        await server.start()
        exit_stack.push_async_callback(server.stop)
        await hub.start()
        exit_stack.push_async_callback(hub.aclose)
        channels = await exit_stack.enter_async_context(aclosing(ChannelPool()))
        senders = await exit_stack.enter_async_context(
            aclosing(KVSenders(source, "sender", channels.get, new_journal()))
        )
        async with aclosing(
            hub.expect("request", 1, "store", "sender", reserved, keys(*numbers), transport)
        ) as incoming:
            async with aclosing(senders.sender(incoming.grant, "request")) as sender:
                await sender.open()
                await sender.send(0, pinned, keys(*numbers))
                await sender.finish()
            await incoming.wait()
    source.unpin(pinned)
    for slot, block_hash in zip(reserved, keys(*numbers), strict=True):
        target.commit(slot, block_hash)
    slots = target.pin(keys(*numbers)).values()
    assert [bytes(target.view(slot)) for slot in slots] == [block(n) for n in numbers]
    target.unpin(list(slots))
    for tier in (source, target):
        tier.check_invariants()
        tier.check_idle()
