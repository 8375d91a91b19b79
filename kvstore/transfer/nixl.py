"""Transport `nixl`: the receiver reads blocks out of the sender's memory by NIXL, over RDMA where both hosts have it.

Needs the extra `pdmesh[nixl]`; a worker without it neither offers nor takes this transport. The sender registers the
memory in which its blocks lie and describes it once on each connection; then it says, in the frames of transport `tcp`
and over such a connection, where each block begins, and the receiver reads, verifies and only then copies it into
place. What network the library takes is its own choice; its variables (UCX_TLS, UCX_NET_DEVICES) steer it. Without RDMA
transport `tcp` is faster between hosts and comes first; with RDMA, put this one first: --transports shm,nixl,tcp,grpc.

The receiver pulls, for the reasons of transport `shm`, and a read that goes on after the transfer was revoked cannot
reach a block: see nixl_agent.py. What a sender reuses too early fails its checksum.

The frames are not encrypted, and a description opens the sender's whole KV memory to whoever sees it: this transport is
for a network on which all are trusted.

It moves host memory. Where the engine computes on a device, blocks are staged in host memory first, as for every other
transport; from device to device directly is not built.
"""

import asyncio
from collections.abc import Sequence

import numpy as np

from kvstore.transfer.base import BlockMemory, crc32c
from kvstore.transfer.connection import Connection
from kvstore.transfer.frames import Frame, FrameType
from kvstore.transfer.nixl_agent import MAX_DESCRIPTION_BYTES, LentMemory, Peer, RemoteReader
from kvstore.transfer.places import blocks_per_part, receive_places, send_places
from kvstore.transfer.socket_receiver import SocketReceiver
from kvstore.transfer.states import TransferState
from kvstore.transfer.tcp import bind_tcp, check_crc, connect_tcp
from kvstore.transfer.tickets import Incoming, TicketTable
from pdmesh.errors import ConfigError, CorruptionError, UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.types import MemoryFile

# Each costs a round trip: larger than those of the other transports, measured.
TARGET_PART_BYTES = 2 * 1024 * 1024


class NixlReceiver:
    """Implements KVReceiver. Its address, host:port, is that of the connections for frames."""

    def __init__(self, memory: BlockMemory, tickets: TicketTable, host: str, advertise: str) -> None:
        self._memory = memory
        self._advertise = advertise
        self._reader: RemoteReader | None = None
        self._sockets = SocketReceiver("nixl", tickets, lambda: bind_tcp(host), self._taker)

    @property
    def address(self) -> str:
        return f"{self._advertise}:{self._sockets.listener.getsockname()[1]}"

    async def start(self) -> None:
        try:
            self._reader = await asyncio.to_thread(RemoteReader, lambda: _max_part_bytes(self._memory))
        except UnavailableError as error:
            raise ConfigError(f"{error.message}; leave nixl out of --transports, or repair pdmesh[nixl]") from error
        await self._sockets.start()

    async def aclose(self) -> None:
        await self._sockets.aclose()
        reader, self._reader = self._reader, None
        if reader is not None:
            await asyncio.to_thread(reader.close)

    def _taker(self, connection: Connection) -> "_NixlTaker":
        assert self._reader is not None, "start the receiver first"
        return _NixlTaker(connection, self._memory, self._reader)


class _NixlTaker:
    """Reads blocks out of the memory that one sender lends."""

    def __init__(self, connection: Connection, memory: BlockMemory, reader: RemoteReader) -> None:
        self._connection = connection
        self._memory = memory
        self._reader = reader
        self._description = b""
        self._peer: Peer | None = None

    def begin(self) -> bool:
        frame = self._connection.receive_frame()
        if frame is None:
            return False
        if frame.type is not FrameType.MEMORY or frame.num_bytes > MAX_DESCRIPTION_BYTES:
            raise CorruptionError("a nixl connection begins with MEMORY", reason="KV_PROTOCOL", stage="transfer")
        self._description = self._connection.receive_body(frame.num_bytes)
        return True

    def take(self, incoming: Incoming, frame: Frame) -> None:
        if self._peer is None:
            # Not before it has redeemed a ticket: the library parses this, and connects to where it says.
            self._peer = self._reader.connect(self._description)
        block_bytes = incoming.memory.block_bytes
        places = receive_places(self._connection, frame, block_bytes, self._peer.num_bytes)
        num_bytes = frame.count * block_bytes
        if num_bytes > _max_part_bytes(self._memory):
            raise CorruptionError(f"a part of {num_bytes} bytes", reason="KV_OUT_OF_RANGE", stage="transfer")
        with (
            incoming.writing(frame.first, 0, num_bytes, frame.block_hash),
            self._reader.read(
                self._peer, places, block_bytes, lambda: incoming.state is TransferState.RECEIVING
            ) as staged,
        ):
            check_crc(self._connection, frame, crc32c([staged]))
            blocks = np.frombuffer(staged, np.uint8).reshape(frame.count, block_bytes)
            for block, block_id in zip(blocks, incoming.block_ids[frame.first :], strict=False):
                np.copyto(np.frombuffer(incoming.memory.view(block_id), np.uint8), block)

    def close(self) -> None:
        if self._peer is not None:
            self._reader.disconnect(self._peer)


class NixlLink:
    """Implements socket_sender.Link: lends the memory in which the blocks of `memory` lie one after the other.

    Args:
        file: Of that memory; only its size is used.
    """

    def __init__(self, memory: BlockMemory, file: MemoryFile) -> None:
        self._memory = memory
        self._file = file
        self._lending: asyncio.Future[LentMemory] | None = None

    def blocks_per_part(self, block_bytes: int) -> int:
        return blocks_per_part(block_bytes, TARGET_PART_BYTES)

    async def connect(self, address: str) -> Connection:
        if self._lending is None:
            # Once, and not undone where the first who asks is cancelled: registering may take seconds.
            self._lending = asyncio.ensure_future(
                asyncio.to_thread(LentMemory, self._memory.view(0), self._file.num_bytes)
            )
        description = (await asyncio.shield(self._lending)).description
        connection = await connect_tcp(address)
        try:
            connection.send([Frame(FrameType.MEMORY, num_bytes=len(description)).pack(), description])
        except OSError as error:
            connection.close()
            raise UnavailableError(
                f"cannot reach {address} for KV: {error}", reason="RECEIVER_LOST", stage="transfer"
            ) from error
        return connection

    def send_part(
        self,
        connection: Connection,
        memory: BlockMemory,
        first: int,
        block_ids: Sequence[int],
        block_hash: BlockHash,
    ) -> int:
        return send_places(connection, memory, first, block_ids, block_hash)


def _max_part_bytes(memory: BlockMemory) -> int:
    """The most that one part may hold, and so the staging memory of one read."""
    return max(TARGET_PART_BYTES, memory.block_bytes)
