"""One end of a KV transfer as a program, which stops itself at a named point: to be killed there, or to go on later.

    python -m tests.kv_child send POINT TRANSPORT ADDRESS TICKET_HEX    prints "done", or "failed" and the reason
    python -m tests.kv_child receive POINT TRANSPORT                    prints address and ticket; then "done right",
                                                                        "done wrong", or "failed" and the reason

Four blocks travel, in two calls of `send`; blocks so large that each is a part, over gRPC two.
"""

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from enum import StrEnum

from kvstore.transfer.base import Grant
from kvstore.transfer.connection import Connection
from kvstore.transfer.frames import HEADER_BYTES, MAGIC, Frame, FrameType
from kvstore.transfer.grpc_transport import GrpcSender
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.senders import KVSenders
from kvstore.transfer.tickets import Incoming, TicketTable
from pdmesh.channels import ChannelPool
from pdmesh.errors import MeshError
from pdmesh.server import GrpcServer
from tests.kv_endpoints import EPOCH, INCARNATION, REQUEST_ID, SENDER_ID, BytesMemory, hashes, new_journal

NUM_BLOCKS = 4
BLOCK_BYTES = 512 * 1024
SEED = 1


_MAGIC = MAGIC.to_bytes(4, "little")


class Point(StrEnum):
    """Where the program stops itself."""

    OPENING = "opening"
    TICKET_TAKEN = "ticket-taken"
    WITHIN_PART = "within-part"
    BETWEEN_PARTS = "between-parts"
    BEFORE_FINISH = "before-finish"
    BEFORE_ACK = "before-ack"


def stop() -> None:
    """Returns when somebody has this process continue."""
    # To this thread, so that it does not go on while the system stops the others first.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


# The sender's points that lie inside of its methods.


def stop_in_frames(point: Point) -> None:
    """Sockets: in the middle of the bytes of OPEN or of the second PART, or after FINISH."""
    send = Connection.send
    num_parts = 0

    def send_and_stop(self: Connection, pieces: "list[memoryview | bytes]") -> None:
        nonlocal num_parts
        data = b"".join(pieces)
        # A part's bytes come in several calls, the first with its header.
        kind = Frame.parse(data[:HEADER_BYTES]).type if data[:4] == _MAGIC and len(data) >= HEADER_BYTES else None
        num_parts += kind is FrameType.PART
        if (point, kind) == (Point.OPENING, FrameType.OPEN) or (
            (point, kind, num_parts) == (Point.WITHIN_PART, FrameType.PART, 2)
        ):
            send(self, [data[: len(data) // 2]])
            stop()
            data = data[len(data) // 2 :]
        send(self, [data])
        if (point, kind) == (Point.BEFORE_ACK, FrameType.FINISH):
            stop()

    Connection.send = send_and_stop  # type: ignore[assignment,method-assign]  # the narrower argument is what we pass


def stop_in_messages(point: Point) -> None:
    """gRPC: before the first message, in the middle of the second block, or after the last message."""
    write = GrpcSender._write
    # Opening, two for each block, the end.
    before, after = {Point.OPENING: (0, -1), Point.WITHIN_PART: (4, -1), Point.BEFORE_ACK: (-1, 9)}.get(point, (-1, -1))
    num_messages = 0

    async def write_and_stop(self: GrpcSender, request: bytes) -> None:
        nonlocal num_messages
        if num_messages == before:
            stop()
        await write(self, request)
        if num_messages == after:
            stop()
        num_messages += 1

    GrpcSender._write = write_and_stop  # type: ignore[method-assign]


STOP_INSIDE: dict[str, Callable[[Point], None]] = {
    "shm": stop_in_frames,
    "tcp": stop_in_frames,
    "nixl": stop_in_frames,
    "grpc": stop_in_messages,
}


async def send_blocks(point: Point, grant: Grant) -> None:
    STOP_INSIDE[grant.transport](point)
    channels = ChannelPool()
    senders = KVSenders(BytesMemory(NUM_BLOCKS, BLOCK_BYTES, SEED), INCARNATION, channels.get, new_journal())

    def at(reached: Point) -> None:
        if reached is point:
            stop()

    half = NUM_BLOCKS // 2
    try:
        async with aclosing(senders.sender(grant, REQUEST_ID)) as sender:
            await sender.open()
            at(Point.TICKET_TAKEN)
            await sender.send(0, range(half), hashes(half))
            at(Point.BETWEEN_PARTS)
            await sender.send(half, range(half, NUM_BLOCKS), hashes(half, half))
            at(Point.BEFORE_FINISH)
            await sender.finish()
        print("done", flush=True)
    except MeshError as error:
        print("failed", error.reason, flush=True)
    await senders.aclose()
    await channels.aclose()


# The receiver's points, the same for every transport.


class StoppingMemory(BytesMemory):
    """Stops, once, when the second block is about to be written."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        super().__init__(num_blocks, block_bytes)
        self._has_stopped = False

    def view(self, block_id: int) -> memoryview:
        if block_id == 1 and not self._has_stopped:
            self._has_stopped = True
            stop()
        return super().view(block_id)


def stop_at_tickets(point: Point) -> None:
    redeem, writing, finish = TicketTable.redeem, Incoming.writing, Incoming.finish

    def redeem_and_stop(
        self: TicketTable,
        ticket: bytes,
        epoch: int,
        request_id: str,
        incarnation: str,
        transport: str,
        stop_writer: Callable[[], None],
    ) -> Incoming:
        if point is Point.OPENING:
            stop()
        incoming = redeem(self, ticket, epoch, request_id, incarnation, transport, stop_writer)
        if point is Point.TICKET_TAKEN:
            stop()
        return incoming

    @contextmanager
    def writing_and_stop(self: Incoming, first: int, offset: int, num_bytes: int, block_hash: bytes) -> Iterator[None]:
        with writing(self, first, offset, num_bytes, block_hash):
            yield
        if point is Point.BETWEEN_PARTS and self.num_parts == 1:
            stop()

    def finish_and_stop(self: Incoming, num_parts: int, num_bytes: int) -> None:
        if point is Point.BEFORE_FINISH:
            stop()
        finish(self, num_parts, num_bytes)
        if point is Point.BEFORE_ACK:
            stop()

    TicketTable.redeem = redeem_and_stop  # type: ignore[method-assign,assignment]
    Incoming.writing = writing_and_stop  # type: ignore[method-assign,assignment]
    Incoming.finish = finish_and_stop  # type: ignore[method-assign]


async def receive_blocks(point: Point, transport: str) -> None:
    stop_at_tickets(point)
    memory = (StoppingMemory if point is Point.WITHIN_PART else BytesMemory)(NUM_BLOCKS, BLOCK_BYTES)
    server = GrpcServer("127.0.0.1", 0)
    hub = ReceiverHub(memory, [transport], server, "127.0.0.1", "127.0.0.1", new_journal())
    await server.start()
    await hub.start()
    incoming = hub.expect(REQUEST_ID, EPOCH, SENDER_ID, INCARNATION, range(NUM_BLOCKS), hashes(NUM_BLOCKS), transport)
    async with incoming:
        print(incoming.grant.address, incoming.grant.ticket.hex(), flush=True)
        try:
            await incoming.wait()
            right = memory.content == BytesMemory(NUM_BLOCKS, BLOCK_BYTES, SEED).content
            print("done", "right" if right else "wrong", flush=True)
        except MeshError as error:
            print("failed", error.reason, flush=True)
    await hub.aclose()
    await server.stop()


if __name__ == "__main__":
    role, point_, transport_, *rest = sys.argv[1:]
    if role == "send":
        grant_ = Grant(bytes.fromhex(rest[1]), EPOCH, transport_, rest[0])
        asyncio.run(send_blocks(Point(point_), grant_))
    else:
        asyncio.run(receive_blocks(Point(point_), transport_))
