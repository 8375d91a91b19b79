"""Transport `shm`: on one host, the receiver copies blocks out of the sender's memory.

The sender's KV lies in a memory file. It lends the file's descriptor over a Unix socket and then says, in the frames
of transport `tcp`, where each block begins; the receiver copies it into place and verifies the copy. One copy, at the
speed of memory.

The receiver pulls, rather than the sender writing into the receiver's cache, so that no foreign process ever has a
cache writable: a sender that is stopped, late or wrong cannot touch a block that was freed and is somebody else's by
now. What a sender reuses too early fails its checksum, like any other corruption.
"""

import fcntl
import functools
import hashlib
import mmap
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvstore.transfer.base import BlockMemory, crc32c
from kvstore.transfer.connection import Connection
from kvstore.transfer.frames import Frame, FrameType
from kvstore.transfer.places import blocks_per_part, receive_places, send_places
from kvstore.transfer.socket_receiver import SocketReceiver
from kvstore.transfer.tcp import check_crc
from kvstore.transfer.tickets import Incoming, TicketTable
from pdmesh.errors import CorruptionError, TicketError, UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.types import MemoryFile

# The receiver copies a part while the sender computes its checksum; then each waits for the other.
TARGET_PART_BYTES = 8 * 1024 * 1024
# Linux; from sys/socket.h, for names that are not files (unix(7)).
_ABSTRACT = "\0pdmesh-kv/"


@functools.cache
def host_id() -> str:
    """Equal in processes that reach each other by abstract Unix sockets: same boot, same network namespace.

    Empty where there is no such thing: then nobody is on one host with us.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]


def why_unreachable(address: str) -> str:
    """Why a receiver at this address cannot be reached from here by `shm`; empty if it can."""
    return "" if host_id() and address.partition("/")[0] == host_id() else "it is on another host"


class ShmReceiver:
    """Implements KVReceiver. Its address: host_id/name, the name being an abstract Unix socket's."""

    def __init__(self, tickets: TicketTable) -> None:
        self._name = secrets.token_hex(8)
        self._sockets = SocketReceiver("shm", tickets, self._bind, _ShmTaker)

    @property
    def address(self) -> str:
        return f"{host_id()}/{self._name}"

    async def start(self) -> None:
        await self._sockets.start()

    async def aclose(self) -> None:
        await self._sockets.aclose()

    def _bind(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(_ABSTRACT + self._name)
        return listener


class _ShmTaker:
    """Copies blocks out of the memory that one sender lent, which stays mapped as long as its connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._map: mmap.mmap | None = None
        self._lent: np.ndarray[tuple[int], np.dtype[np.uint8]] | None = None

    def begin(self) -> bool:
        # Abstract sockets have no permissions: any user of this host may connect.
        if self._connection.peer_uid() != os.geteuid():
            raise TicketError("shm is for processes of one user", reason="TICKET_SENDER", stage="transfer")
        frame, descriptor = self._connection.receive_descriptor()
        if frame is None:
            return False
        if descriptor is None:
            raise CorruptionError("a shm connection begins with a descriptor", reason="KV_PROTOCOL", stage="transfer")
        try:
            if frame.type is not FrameType.MEMORY:
                raise CorruptionError("a shm connection begins with MEMORY", reason="KV_PROTOCOL", stage="transfer")
            # Without the seal, reading past the end of a file that was cut short would kill this process.
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if not sealed or not 0 < frame.num_bytes <= os.fstat(descriptor).st_size:
                raise CorruptionError("this memory may shrink", reason="KV_PROTOCOL", stage="transfer")
            self._map = mmap.mmap(descriptor, frame.num_bytes, prot=mmap.PROT_READ)
        except OSError as error:
            raise UnavailableError(f"cannot map the sender's memory: {error}", stage="transfer") from error
        finally:
            os.close(descriptor)
        self._lent = np.frombuffer(self._map, np.uint8)
        return True

    def take(self, incoming: Incoming, frame: Frame) -> None:
        block_bytes = incoming.memory.block_bytes
        assert self._lent is not None, "begin comes first"
        places = receive_places(self._connection, frame, block_bytes, len(self._lent))
        with incoming.writing(frame.first, 0, frame.count * block_bytes, frame.block_hash):
            crc = 0
            for place, block_id in zip(places, incoming.block_ids[frame.first :], strict=False):
                view = incoming.memory.view(block_id)
                np.copyto(np.frombuffer(view, np.uint8), self._lent[place : place + block_bytes])
                # While the copy is in the processor's cache.
                crc = crc32c([view], crc)
            check_crc(self._connection, frame, crc)

    def close(self) -> None:
        self._lent = None
        if self._map is not None:
            self._map.close()


class ShmLink:
    """Implements socket_sender.Link: lends `file`, in which the blocks lie."""

    def __init__(self, file: MemoryFile) -> None:
        self._file = file

    def blocks_per_part(self, block_bytes: int) -> int:
        return blocks_per_part(block_bytes, TARGET_PART_BYTES)

    async def connect(self, address: str) -> Connection:
        reason = why_unreachable(address)
        try:
            if reason:
                raise ConnectionRefusedError(reason)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # Within a host it succeeds or fails at once.
                sock.setblocking(False)
                sock.connect(_ABSTRACT + address.partition("/")[2])
                connection = Connection(sock)
                memory = Frame(FrameType.MEMORY, num_bytes=self._file.num_bytes)
                connection.send_descriptor(memory.pack(), self._file.descriptor)
                return connection
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            raise UnavailableError(
                f"cannot reach {address} for KV: {error}", reason="RECEIVER_LOST", stage="transfer"
            ) from error

    def send_part(
        self,
        connection: Connection,
        memory: BlockMemory,
        first: int,
        block_ids: Sequence[int],
        block_hash: BlockHash,
    ) -> int:
        return send_places(connection, memory, first, block_ids, block_hash)
