"""What every transport promises: the right bytes in the right blocks, or an error on both sides and nothing written."""

import asyncio
import random
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import grpc
import pytest

from kvstore.transfer import connection
from kvstore.transfer.base import crc32c
from kvstore.transfer.frames import Frame, FrameType
from kvstore.transfer.shm import host_id
from pdmesh.errors import CorruptionError, MeshError, PreconditionError, TicketError, UnavailableError
from pdmesh.v1 import kv_transfer_pb2 as pb
from pdmesh.v1 import kv_transfer_pb2_grpc
from tests.fault_proxy import FaultProxy
from tests.kv_endpoints import EPOCH, INCARNATION, REQUEST_ID, SENDER_ID, endpoints, hash_of, hashes
from tests.kv_transfers import KIB, MIB, PATIENCE_S, assert_told, halfway, send_all, send_pieces

# What goes well.


@pytest.mark.parametrize("block_bytes", [1, 4 * KIB, 256 * KIB + 17, 3 * MIB])
async def test_bytes_arrive_whatever_the_order(transport: str, block_bytes: int) -> None:
    num_blocks = 12
    draw = random.Random(block_bytes)
    async with endpoints(transport, num_blocks, block_bytes) as ends:
        for _ in range(4):
            count = draw.randrange(1, num_blocks)
            source_ids, target_ids = (draw.sample(range(num_blocks), count) for _ in range(2))
            untouched = [block_id for block_id in range(num_blocks) if block_id not in target_ids]
            ends.target.fill(range(num_blocks), 0xEE)
            cuts = sorted(draw.sample(range(1, count), draw.randrange(count)))
            pieces = list(zip([0, *cuts], [*cuts, count], strict=True))
            draw.shuffle(pieces)
            incoming = ends.expect(target_ids)
            async with aclosing(incoming), aclosing(ends.sender(incoming.grant)) as sender:
                await sender.open()
                for start, end in pieces:
                    await sender.send(start, source_ids[start:end], hashes(end - start, start))
                sent = await sender.finish()
                received = await incoming.wait()
            assert sent.num_bytes == received.num_bytes == count * block_bytes
            assert sent.num_parts == received.num_parts > 0
            assert ends.target.read(target_ids) == ends.source.read(source_ids)
            assert ends.target.read(untouched) == b"\xee" * (len(untouched) * block_bytes)


async def test_many_small_blocks_travel_in_few_parts() -> None:
    async with endpoints("tcp", 3000, 64) as ends, aclosing(ends.expect(range(3000))) as incoming:
        await send_all(ends.sender(incoming.grant), 3000)
        stats = await incoming.wait()
        assert stats.num_parts < 5
        assert ends.target.content == ends.source.content


async def test_nothing_to_send_is_a_transfer_too(transport: str) -> None:
    async with endpoints(transport, 1, 64) as ends, aclosing(ends.expect([])) as incoming:
        await send_all(ends.sender(incoming.grant), 0)
        assert (await incoming.wait()).num_bytes == 0


async def test_many_transfers_at_once_over_one_pool(transport: str) -> None:
    num_transfers, blocks_each = 40, 5
    async with endpoints(transport, num_transfers * blocks_each, 40 * KIB) as ends:

        async def transfer(number: int) -> None:
            block_ids = range(number * blocks_each, (number + 1) * blocks_each)
            request_id = f"request-{number}"
            async with aclosing(ends.expect(block_ids, request_id)) as incoming:
                async with aclosing(ends.sender(incoming.grant, request_id=request_id)) as sender:
                    await sender.open()
                    for index, block_id in enumerate(block_ids):
                        await sender.send(index, [block_id], [hash_of(index)])
                        await asyncio.sleep(0)
                    await sender.finish()
                await incoming.wait()

        for _ in range(2):
            ends.target.fill(range(num_transfers * blocks_each), 0)
            await asyncio.gather(*map(transfer, range(num_transfers)))
            assert ends.target.content == ends.source.content


async def test_a_connection_carries_one_transfer_after_the_other() -> None:
    async with endpoints("tcp", 4, KIB) as ends, FaultProxy(ends.address) as proxy:
        for _ in range(5):
            async with aclosing(ends.expect(range(4))) as incoming:
                await send_all(ends.sender(incoming.grant, via=proxy.address), 4)
                await incoming.wait()
        assert proxy.num_connections == 1


async def test_an_idle_connection_that_died_is_replaced_unnoticed() -> None:
    async with endpoints("tcp", 4, KIB) as ends, FaultProxy(ends.address) as proxy:
        for number in range(3):
            async with aclosing(ends.expect(range(4))) as incoming:
                await send_all(ends.sender(incoming.grant, via=proxy.address), 4)
                await incoming.wait()
            # Nothing tells the sender before it writes.
            proxy.reset_next = number < 2
        assert (proxy.num_faults, proxy.num_connections) == (2, 3)


async def test_a_pause_between_parts_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENCE_TIMEOUT_S", 0.1)
    async with endpoints("tcp", 2, KIB) as ends, aclosing(ends.expect(range(2))) as incoming:
        async with aclosing(ends.sender(incoming.grant)) as sender:
            await sender.open()
            await sender.send(0, [0], hashes(1))
            # The prefill worker computes its next chunk, for longer than a peer may be silent within a part.
            await asyncio.sleep(0.4)
            await sender.send(1, [1], [hash_of(1)])
            await sender.finish()
        await incoming.wait()
        assert ends.target.content == ends.source.content


# Who may write what.


async def test_a_ticket_opens_for_its_own_sender_alone_and_once(transport: str) -> None:
    async with endpoints(transport, 2, KIB) as ends, aclosing(ends.expect([0])) as incoming:
        grant = incoming.grant
        strangers = {
            "TICKET_UNKNOWN": ends.sender(replace(grant, ticket=bytes(16))),
            "TICKET_EPOCH": ends.sender(replace(grant, epoch=EPOCH - 1)),
            "TICKET_SENDER": ends.sender(grant, request_id="another request"),
        }
        for reason, stranger in strangers.items():
            with pytest.raises((TicketError, UnavailableError)) as refused:
                await send_all(stranger, 1)
            assert_told(refused.value, transport, reason)
        assert not any(ends.target.content)
        # What others tried does not use the ticket up.
        await send_all(ends.sender(grant), 1)
        await incoming.wait()
        with pytest.raises((TicketError, UnavailableError)) as refused:
            await send_all(ends.sender(grant), 1)
        assert_told(refused.value, transport, "TICKET_USED")
        assert ends.target.read([0]) == ends.source.read([0])


async def test_a_past_incarnation_is_refused(transport: str) -> None:
    async with endpoints(transport, 1, KIB) as ends:
        expected = ends.hub.expect(REQUEST_ID, EPOCH, SENDER_ID, "sender-2", [0], hashes(1), transport)
        async with aclosing(expected) as incoming:
            with pytest.raises((TicketError, UnavailableError)) as refused:
                await send_all(ends.sender(incoming.grant), 1)
            assert_told(refused.value, transport, "TICKET_SENDER")
            assert not any(ends.target.content)


async def test_a_closed_transfer_s_ticket_is_worth_nothing(transport: str) -> None:
    async with endpoints(transport, 1, KIB) as ends:
        incoming = ends.expect([0])
        await incoming.aclose()
        with pytest.raises((TicketError, UnavailableError)) as refused:
            await send_all(ends.sender(incoming.grant), 1)
        assert_told(refused.value, transport, "TICKET_UNKNOWN")
        assert not any(ends.target.content)


async def test_a_transport_that_was_not_offered_is_refused(transport: str) -> None:
    async with endpoints(transport, 1, KIB) as ends:
        with pytest.raises(PreconditionError):
            ends.hub.expect(REQUEST_ID, EPOCH, SENDER_ID, INCARNATION, [0], hashes(1), "pigeon")


# What arrives wrong.


@pytest.mark.parametrize(
    ("sends", "reason"),
    [
        ([(0, [0, 1]), (1, [1])], "KV_DUPLICATED"),
        ([(0, [0, 0, 0, 0, 0])], "KV_OUT_OF_RANGE"),
        ([(4, [0])], "KV_OUT_OF_RANGE"),
        ([(2**32 - 1, [0])], "KV_OUT_OF_RANGE"),
        ([(0, [0, 1, 2])], "KV_INCOMPLETE"),
        ([], "KV_INCOMPLETE"),
    ],
)
async def test_what_the_ticket_does_not_cover_exactly_fails_both_sides(
    transport: str, sends: list[tuple[int, list[int]]], reason: str
) -> None:
    async with endpoints(transport, 8, KIB) as ends, aclosing(ends.expect([4, 5, 6, 7])) as incoming:
        with pytest.raises((CorruptionError, UnavailableError)) as sender_told:
            await send_pieces(ends.sender(incoming.grant), sends)
        with pytest.raises(CorruptionError) as receiver_told:
            await incoming.wait()
        assert receiver_told.value.reason == reason
        assert_told(sender_told.value, transport, reason)
        assert not any(ends.target.read([0, 1, 2, 3]))


async def test_a_bit_flipped_on_the_way_fails_both_sides(transport: str) -> None:
    async with (
        endpoints(transport, 8, 256 * KIB) as ends,
        FaultProxy(ends.address) as proxy,
        aclosing(ends.expect(range(8))) as incoming,
    ):
        proxy.rewrite_at = await halfway(ends, proxy, 8)
        with pytest.raises((CorruptionError, UnavailableError)) as sender_told:
            await send_all(ends.sender(incoming.grant, via=proxy.address), 8)
        with pytest.raises(CorruptionError) as receiver_told:
            await incoming.wait()
        assert_told(sender_told.value, transport, receiver_told.value.reason)
        assert proxy.num_faults == 1


async def test_a_refused_sender_is_told_before_it_has_sent_everything(transport: str) -> None:
    async with (
        endpoints(transport, 64, MIB) as ends,
        aclosing(ends.expect([0])) as incoming,
        FaultProxy(ends.address) as proxy,
    ):
        # So that what is told has time to come back.
        proxy.bytes_per_s = 2e8
        with pytest.raises((CorruptionError, UnavailableError)) as told:
            await send_all(ends.sender(incoming.grant, via=proxy.address), 64)
        assert_told(told.value, transport, "KV_OUT_OF_RANGE")
        assert proxy.num_bytes < 48 * MIB


async def test_parts_overlapping_within_a_block_are_refused() -> None:
    async with endpoints("grpc", 1, KIB) as ends, aclosing(ends.expect([0])) as incoming:

        async def parts() -> AsyncIterator[pb.PushRequest]:
            yield pb.PushRequest(
                open=pb.PushOpen(
                    ticket=incoming.grant.ticket, epoch=EPOCH, request_id=REQUEST_ID, sender_incarnation=INCARNATION
                )
            )
            for offset in (0, 600, 512):
                payload = ends.source.read([0])[offset : offset + 512]
                part = pb.KVPart(offset_bytes=offset, crc32c=crc32c([payload]), block_hash=hash_of(0), payload=payload)
                yield pb.PushRequest(part=part)

        async with grpc.aio.insecure_channel(incoming.grant.address) as channel:
            call = kv_transfer_pb2_grpc.KVTransferStub(channel).Push(parts())
            with pytest.raises(grpc.aio.AioRpcError):
                await call
        with pytest.raises(CorruptionError, match="twice"):
            await incoming.wait()


@pytest.mark.parametrize("num_bytes", [0, 5, 20, 24, 30, 200])
async def test_noise_does_not_harm_the_receiver(num_bytes: int) -> None:
    async with endpoints("tcp", 1, KIB) as ends:
        host, _, port = ends.address.rpartition(":")
        draw = random.Random(num_bytes)
        openings = (
            b"",
            Frame(FrameType.OPEN, num_bytes=2**40).pack(),
            Frame(FrameType.OPEN, num_bytes=num_bytes).pack(),
            Frame(FrameType.PART, count=1, num_bytes=KIB).pack(),
            Frame(FrameType.FINISH).pack(),
        )
        for opening in openings:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(opening + draw.randbytes(num_bytes))
            writer.write_eof()
            async with asyncio.timeout(PATIENCE_S):
                await reader.read()
            writer.close()
        async with aclosing(ends.expect([0])) as incoming:
            await send_all(ends.sender(incoming.grant), 1)
            await incoming.wait()


# Who is lost, and who gives up.


async def test_a_cut_connection_fails_both_sides(transport: str) -> None:
    async with (
        endpoints(transport, 8, 256 * KIB) as ends,
        aclosing(ends.expect(range(8))) as incoming,
        FaultProxy(ends.address) as proxy,
    ):
        proxy.cut_at = await halfway(ends, proxy, 8)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(UnavailableError):
                await send_all(ends.sender(incoming.grant, via=proxy.address), 8)
            with pytest.raises(UnavailableError):
                await incoming.wait()
        assert proxy.num_faults == 1


async def test_no_write_lands_after_the_receiver_gave_up(transport: str) -> None:
    async with endpoints(transport, 32, MIB) as ends:
        incoming = ends.expect(range(32))
        async with FaultProxy(ends.address) as proxy:
            proxy.stall_at = await halfway(ends, proxy, 32)
            sending = asyncio.create_task(send_all(ends.sender(incoming.grant, via=proxy.address), 32))
            async with asyncio.timeout(PATIENCE_S):
                await proxy.stalled.wait()
                while not any(ends.target.view(3)):
                    await asyncio.sleep(0.01)
                await incoming.aclose()
            # The blocks are somebody else's from here on. More of the old bytes come, and must not land.
            ends.target.fill(range(32), 0xAB)
            proxy.resume()
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(MeshError):
                    await sending
                with pytest.raises(UnavailableError):
                    await incoming.wait()
                while not proxy.num_late_bytes:
                    await asyncio.sleep(0.01)
        await ends.stop_receiving()
        assert ends.target.content == b"\xab" * len(ends.target.content)


async def test_giving_up_again_and_again_keeps_blocks_clean(transport: str) -> None:
    """Aborts at every moment: whatever was under way, blocks written by a new owner stay as they are."""
    async with endpoints(transport, 16, 512 * KIB) as ends:
        for step in range(12):
            incoming = ends.expect(range(16))
            sending = asyncio.create_task(send_all(ends.sender(incoming.grant), 16))
            for _ in range(step * 3):
                await asyncio.sleep(0.0005)
            await incoming.aclose()
            ends.target.fill(range(16), step)
            await asyncio.gather(sending, return_exceptions=True)
            assert ends.target.content == bytes([step]) * len(ends.target.content)
        assert ends.hub.num_open_tickets == 0


async def test_a_sender_that_is_cancelled_leaves_at_once_and_the_receiver_knows(transport: str) -> None:
    async with endpoints(transport, 32, MIB) as ends, aclosing(ends.expect(range(32))) as incoming:
        async with FaultProxy(ends.address) as proxy:
            proxy.stall_at = await halfway(ends, proxy, 32)
            sending = asyncio.create_task(send_all(ends.sender(incoming.grant, via=proxy.address), 32))
            async with asyncio.timeout(PATIENCE_S):
                await proxy.stalled.wait()
                sending.cancel()
                await asyncio.wait([sending])
            assert sending.cancelled()
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(UnavailableError):
                await incoming.wait()


async def test_a_sender_that_closes_unfinished_aborts(transport: str) -> None:
    async with endpoints(transport, 2, KIB) as ends, aclosing(ends.expect(range(2))) as incoming:
        sender = ends.sender(incoming.grant)
        await sender.open()
        await sender.send(0, [0, 1], hashes(2))
        async with asyncio.timeout(PATIENCE_S):
            # Over gRPC a call that is cancelled at once may never reach the receiver, which then has nothing to end.
            while not any(ends.target.view(0)):
                await asyncio.sleep(0.01)
            await sender.aclose()
            await sender.aclose()
            with pytest.raises(UnavailableError):
                await incoming.wait()


async def test_a_closed_sender_reads_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread cannot be cancelled: closing waits for it, because the caller frees the blocks next."""
    async with endpoints("tcp", 8, KIB) as ends, aclosing(ends.expect(range(8))) as incoming:
        reading, may_go_on, num_reads = threading.Event(), threading.Event(), 0

        def slow_view(block_id: int) -> memoryview:
            nonlocal num_reads
            reading.set()
            may_go_on.wait(PATIENCE_S)
            num_reads += 1
            return memoryview(bytearray(KIB))

        monkeypatch.setattr(ends.source, "view", slow_view)
        sender = ends.sender(incoming.grant)
        await sender.open()
        sending = asyncio.create_task(sender.send(0, range(8), hashes(8)))
        while not reading.is_set():
            await asyncio.sleep(0.01)
        sending.cancel()
        closing = asyncio.create_task(sender.aclose())
        await asyncio.wait([closing], timeout=0.1)
        assert not closing.done(), "closed while its thread reads blocks"
        may_go_on.set()
        async with asyncio.timeout(PATIENCE_S):
            await closing
        num_reads_when_closed = num_reads
        await asyncio.sleep(0.05)
        assert num_reads == num_reads_when_closed


async def test_a_receiver_that_stops_ends_its_senders(transport: str) -> None:
    async with endpoints(transport, 32, MIB) as ends:
        incoming, unused = ends.expect(range(16)), ends.expect(range(16, 32))
        async with FaultProxy(ends.address) as proxy:
            proxy.stall_at = await halfway(ends, proxy, 16)
            sending = asyncio.create_task(send_all(ends.sender(incoming.grant, via=proxy.address), 16))
            async with asyncio.timeout(PATIENCE_S):
                await proxy.stalled.wait()
                await ends.stop_receiving()
                for transfer in (incoming, unused):
                    with pytest.raises(UnavailableError):
                        await transfer.wait()
                    await transfer.aclose()
                proxy.resume()
                with pytest.raises(MeshError):
                    await sending


async def test_a_receiver_that_is_not_there(transport: str) -> None:
    # Bound, so that nobody else gets the port; not listening, so that nobody answers.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"{host_id()}/nobody" if transport == "shm" else f"127.0.0.1:{bound.getsockname()[1]}"
        async with endpoints(transport, 1, KIB) as ends, aclosing(ends.expect([0])) as incoming:
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(UnavailableError):
                    await send_all(ends.sender(incoming.grant, via=address), 1)


async def test_connecting_to_silence_can_be_cancelled_at_once() -> None:
    # A listener whose queue is full: the kernel answers nobody.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        with socket.create_connection(address):
            async with endpoints("tcp", 1, KIB) as ends, aclosing(ends.expect([0])) as incoming:
                opening = asyncio.create_task(
                    send_all(ends.sender(incoming.grant, via=f"{address[0]}:{address[1]}"), 1)
                )
                await asyncio.wait([opening], timeout=0.2)
                assert not opening.done(), "it got through: the test tested nothing"
                opening.cancel()
                async with asyncio.timeout(1.0):
                    await asyncio.wait([opening])
                assert opening.cancelled()


async def test_silence_within_a_part_is_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENCE_TIMEOUT_S", 0.2)
    async with (
        endpoints("tcp", 8, MIB) as ends,
        aclosing(ends.expect(range(8))) as incoming,
        FaultProxy(ends.address) as proxy,
    ):
        proxy.stall_at = MIB + 1000
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(UnavailableError):
                await send_all(ends.sender(incoming.grant, via=proxy.address), 8)
            with pytest.raises(UnavailableError):
                await incoming.wait()
        assert proxy.num_faults == 1
