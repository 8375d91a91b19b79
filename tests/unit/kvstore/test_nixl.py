"""What transport `nixl` does beyond the conformance suite: peers that stop in mid-read, die, or were never one."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import numpy as np
import pytest

from decode.config import DecodeConfig
from engine.config import EngineConfig
from kvstore.tiers.config import TierConfig
from kvstore.transfer.base import Grant, TransportOffer, crc32c
from kvstore.transfer.frames import Frame, FrameType
from kvstore.transfer.nixl_agent import LentMemory, Peer, RemoteReader
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.transports import HAS_NIXL
from pdmesh.config import ServiceConfig
from pdmesh.errors import ConfigError, CorruptionError, UnavailableError
from pdmesh.v1 import kv_transfer_pb2 as pb
from tests.kv_endpoints import EPOCH, INCARNATION, REQUEST_ID, endpoints, hash_of, new_journal
from worker.config import WorkerConfig

needs_nixl = pytest.mark.skipif(not HAS_NIXL, reason="needs pip install 'pdmesh[nixl]'")
needs_its_absence = pytest.mark.skipif(HAS_NIXL, reason="of an installation without nixl")

PATIENCE_S = 8.0
MIB = 1024 * 1024
ONES = b"\1" * MIB
# Lends a memory of ones until its end.
LENDER = f"""
from kvstore.transfer.nixl_agent import LentMemory
lent = LentMemory(memoryview(bytearray(b"\\1" * {MIB})), {MIB})
print(lent.description.hex(), flush=True)
input()
"""


class Lender:
    """Another process that lends a memory of ones."""

    def __init__(self, process: asyncio.subprocess.Process, description: bytes) -> None:
        self._process = process
        self.description = description

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def wait_for_state(self, letter: str) -> None:
        """Until the kernel says that it is, for example, stopped: T."""
        while self._state() != letter:
            await asyncio.sleep(0.01)

    def _state(self) -> str:
        with open(f"/proc/{self._process.pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]


@asynccontextmanager
async def lender() -> AsyncIterator[Lender]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LENDER, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield Lender(process, bytes.fromhex((await process.stdout.readline()).decode()))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network on which reads need the other process: on one host the library would read past a stopped one."""
    monkeypatch.setenv("UCX_TLS", "tcp")


@pytest.fixture
def reader(over_tcp: None) -> RemoteReader:
    return RemoteReader(lambda: MIB)


def always() -> bool:
    return True


def read_all(reader: RemoteReader, peer: Peer, is_wanted: Callable[[], bool] = always) -> bytes:
    with reader.read(peer, [0], MIB, is_wanted) as staged:
        return bytes(staged)


async def open_by_hand(grant: Grant, description: bytes) -> asyncio.StreamWriter:
    """Presents a ticket, as the sender that lends the memory so described."""
    host, _, port = grant.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    opening = pb.PushOpen(
        ticket=grant.ticket, epoch=EPOCH, request_id=REQUEST_ID, sender_incarnation=INCARNATION
    ).SerializeToString()
    writer.write(Frame(FrameType.MEMORY, num_bytes=len(description)).pack() + description)
    writer.write(Frame(FrameType.OPEN, num_bytes=len(opening)).pack() + opening)
    return writer


def write_part(writer: asyncio.StreamWriter, first: int, crc: int) -> None:
    """One block of a MiB, at the beginning of the lent memory."""
    writer.write(Frame(FrameType.PART, first, 1, 8, hash_of(first)).pack() + bytes(8) + crc.to_bytes(4, "little"))


async def give_up(reader: RemoteReader, peer: Peer) -> None:
    """Begins a read that cannot end, and gives it up."""
    wanted = True
    reading = asyncio.create_task(asyncio.to_thread(read_all, reader, peer, lambda: wanted))
    await asyncio.wait([reading], timeout=0.2)
    assert not reading.done(), "the other process is not needed: the test tests nothing"
    wanted = False
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(UnavailableError) as error:
            await reading
    assert error.value.reason == "TRANSFER_ABORTED"


@needs_nixl
async def test_what_arrives_after_a_read_was_given_up_harms_no_other_read(reader: RemoteReader) -> None:
    zeros = LentMemory(memoryview(bytearray(MIB)), MIB)
    async with lender() as other:
        peer, own = reader.connect(other.description), reader.connect(zeros.description)
        assert read_all(reader, peer) == ONES
        assert read_all(reader, own) == bytes(MIB)
        other.send_signal(signal.SIGSTOP)
        await other.wait_for_state("T")
        await give_up(reader, peer)
        assert reader.num_set_aside == 1
        with reader.read(own, [0], MIB, always) as staged:
            other.send_signal(signal.SIGCONT)
            async with asyncio.timeout(PATIENCE_S):
                # The bytes that nobody wants any more arrive, and free their staging memory.
                while reader.num_set_aside:
                    await asyncio.sleep(0.01)
            assert bytes(staged) == bytes(MIB)
        assert read_all(reader, peer) == ONES
        reader.disconnect(peer)
        reader.disconnect(own)
    reader.close()


@needs_nixl
async def test_a_sender_that_hangs_in_mid_read_holds_no_blocks(over_tcp: None) -> None:
    async with lender() as other, endpoints("nixl", 2, MIB) as ends:
        incoming = ends.expect([0, 1])
        writer = await open_by_hand(incoming.grant, other.description)
        write_part(writer, 0, crc32c([ONES]))
        async with asyncio.timeout(PATIENCE_S):
            while not any(ends.target.view(0)):
                await asyncio.sleep(0.01)
            other.send_signal(signal.SIGSTOP)
            await other.wait_for_state("T")
            write_part(writer, 1, crc32c([ONES]))
            # The receiver has begun to read by now.
            await asyncio.sleep(0.3)
            await incoming.aclose()
        with pytest.raises(UnavailableError):
            await incoming.wait()
        # The blocks are somebody else's from here on.
        ends.target.fill([0, 1], 0xAB)
        other.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.3)
        assert ends.target.content == b"\xab" * (2 * MIB)
        writer.close()


@needs_nixl
async def test_bytes_that_fail_their_checksum_reach_no_block() -> None:
    ones = LentMemory(memoryview(bytearray(ONES)), MIB)
    async with endpoints("nixl", 1, MIB) as ends, aclosing(ends.expect([0])) as incoming:
        writer = await open_by_hand(incoming.grant, ones.description)
        write_part(writer, 0, crc32c([ONES]) ^ 1)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(CorruptionError) as error:
                await incoming.wait()
        assert error.value.reason == "KV_CORRUPTED"
        assert not any(ends.target.content)
        writer.close()


@needs_nixl
async def test_a_peer_that_dies_in_mid_read_is_noticed(reader: RemoteReader) -> None:
    zeros = LentMemory(memoryview(bytearray(MIB)), MIB)
    own = reader.connect(zeros.description)
    async with lender() as other:
        peer = reader.connect(other.description)
        read_all(reader, peer)
        other.send_signal(signal.SIGSTOP)
        await other.wait_for_state("T")
        reading = asyncio.create_task(asyncio.to_thread(read_all, reader, peer))
        await asyncio.wait([reading], timeout=0.2)
        assert not reading.done()
        other.send_signal(signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(UnavailableError) as error:
                await reading
        assert error.value.reason == "SENDER_LOST"
        # What the library says of a read that failed does not prove that nothing more arrives.
        assert reader.num_set_aside == 1
        reader.disconnect(peer)
        assert read_all(reader, own) == bytes(MIB)
    reader.disconnect(own)
    reader.close()


@needs_nixl
async def test_a_restarted_peer_is_another_one(reader: RemoteReader) -> None:
    for _ in range(2):
        async with lender() as other:
            peer = reader.connect(other.description)
            assert read_all(reader, peer) == ONES
            reader.disconnect(peer)
    reader.close()


@needs_nixl
def test_places_are_read_in_their_order_and_no_others(reader: RemoteReader) -> None:
    content = np.arange(MIB, dtype=np.uint32).astype(np.uint8)
    lent = LentMemory(content.data, MIB)
    peer = reader.connect(lent.description)
    with reader.read(peer, [700, 3, 511], 100, always) as staged:
        assert bytes(staged) == b"".join(content[place : place + 100].tobytes() for place in (700, 3, 511))
    for place in (MIB - 99, MIB, 2**40):
        with pytest.raises(UnavailableError), reader.read(peer, [place], 100, always):
            pass
    assert reader.num_set_aside == 0
    reader.disconnect(peer)
    reader.close()


@needs_nixl
@pytest.mark.parametrize("cut", [0, 16, 40])
def test_what_describes_no_memory_is_refused(reader: RemoteReader, cut: int) -> None:
    lent = LentMemory(memoryview(bytearray(MIB)), MIB)
    for description in (lent.description[:cut], lent.description[:cut] + os.urandom(200)):
        with pytest.raises((CorruptionError, UnavailableError)):
            reader.connect(description)
    peer = reader.connect(lent.description)
    assert read_all(reader, peer) == bytes(MIB)
    reader.disconnect(peer)
    reader.close()


@needs_its_absence
async def test_without_the_library_the_other_transports_are_offered_and_taken() -> None:
    async with endpoints("tcp", 1, MIB) as ends:
        hub = ReceiverHub(ends.target, ["nixl", "tcp"], ends.server, "127.0.0.1", "127.0.0.1", new_journal())
        await hub.start()
        assert [offer.name for offer in hub.offers] == ["tcp"]
        offers = [TransportOffer("nixl", hub.offers[0].address), *hub.offers]
        negotiation = await ends.senders.negotiate(offers, "decode-0")
        assert negotiation.usable == ("tcp",)
        assert negotiation.unusable == {"nixl": "this installation does not have it"}
        await hub.aclose()


@needs_its_absence
def test_naming_it_where_it_is_missing_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'pdmesh\[nixl\]'"):
        DecodeConfig(worker=WorkerConfig(ServiceConfig(), EngineConfig("model"), TierConfig()), transports="nixl,tcp")
