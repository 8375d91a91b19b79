"""The sending end of the transports that have sockets of their own: pooled connections, and threads that block."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from kvstore.transfer.base import BlockMemory, Grant, TransferStats
from kvstore.transfer.connection import Connection
from kvstore.transfer.frames import Frame, FrameType, parse_nack
from pdmesh.errors import CorruptionError, UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.tasks import settled
from pdmesh.v1 import kv_transfer_pb2 as pb

log = logging.getLogger(__name__)

# Transfers beyond these wait their turn.
MAX_SENDING_THREADS = 32
MAX_IDLE_PER_ADDRESS = 8


class Link(Protocol):
    """What is particular to a transport on its sending side."""

    async def connect(self, address: str) -> Connection:
        """A new connection, ready for its first transfer. Raises UnavailableError."""
        ...

    def send_part(
        self,
        connection: Connection,
        memory: BlockMemory,
        first: int,
        block_ids: Sequence[int],
        block_hash: BlockHash,
    ) -> int:
        """Sends a PART, on a thread that may block. Returns the bytes of its blocks; raises OSError.

        `memory` is the link's, or a slice of it.
        """
        ...

    def blocks_per_part(self, block_bytes: int) -> int: ...


class ConnectionPool:
    """Idle connections by address, so that a transfer does not wait for a connect, and the threads that send on them.

    Used on one event loop.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.threads = ThreadPoolExecutor(MAX_SENDING_THREADS, thread_name_prefix="kv-to")
        self._idle: dict[str, list[Connection]] = {}
        self._closed = False

    async def warm(self, address: str) -> None:
        """Sees to it that there is an idle connection to `address`. Raises UnavailableError."""
        self._drop_dead()
        if not self._idle.get(address):
            self.give_back(address, await self.link.connect(address))

    def take(self, address: str) -> Connection | None:
        """An idle connection to `address`, if there is one."""
        self._drop_dead()
        idle = self._idle.get(address)
        return idle.pop() if idle else None

    def give_back(self, address: str, connection: Connection) -> None:
        """Takes over a connection on which nothing is under way."""
        self._drop_dead()
        idle = self._idle.setdefault(address, [])
        if self._closed or len(idle) >= MAX_IDLE_PER_ADDRESS:
            connection.close()
        else:
            idle.append(connection)

    async def aclose(self) -> None:
        """Closes idle connections and ends the threads. Senders are to be closed before."""
        self._closed = True
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()
        await asyncio.to_thread(self.threads.shutdown)

    def _drop_dead(self) -> None:
        # Nothing may be waiting on an idle connection: what is readable is the peer's goodbye.
        for address, idle in list(self._idle.items()):
            for connection in [connection for connection in idle if connection.poll(0)]:
                idle.remove(connection)
                connection.close()
            if not idle:
                del self._idle[address]


class SocketSender:
    """See base.KVSender. What blocks on the socket runs on one of the pool's threads."""

    def __init__(
        self, memory: BlockMemory, grant: Grant, request_id: str, incarnation: str, pool: ConnectionPool
    ) -> None:
        self._memory = memory
        self._address = grant.address
        self._pool = pool
        opening = pb.PushOpen(
            ticket=grant.ticket, epoch=grant.epoch, request_id=request_id, sender_incarnation=incarnation
        ).SerializeToString()
        self._opening = Frame(FrameType.OPEN, num_bytes=len(opening)).pack() + opening
        self._connection: Connection | None = None
        self._working: asyncio.Future[None] | None = None
        self._num_parts = 0
        self._num_bytes = 0
        self._opened_at = 0.0

    async def open(self) -> None:
        """Returns when the receiver has taken the ticket."""
        self._opened_at = time.monotonic()
        idle = self._pool.take(self._address)
        if idle is not None:
            try:
                await self._present(idle)
                return
            except UnavailableError as error:
                # It may have died idle, unnoticed. Nothing was sent on it yet that a second try could double.
                log.info("an idle KV connection was dead, connecting anew: %s", error.message)
                idle.close()
        await self._present(await self._pool.link.connect(self._address))

    async def _present(self, connection: Connection) -> None:
        self._connection = connection
        await self._work(self._open, connection)

    async def send(self, first_index: int, block_ids: Sequence[int], block_hashes: Sequence[BlockHash]) -> None:
        await self._work(self._send, self._open_connection(), first_index, block_ids, block_hashes)

    async def finish(self) -> TransferStats:
        connection = self._open_connection()
        await self._work(self._finish, connection)
        self._connection = None
        self._pool.give_back(self._address, connection)
        return TransferStats(self._num_bytes, self._num_parts, time.monotonic() - self._opened_at)

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection.shut()
        try:
            if self._working is not None:
                # The thread still reads blocks that the caller is about to free.
                await settled(self._working)
        finally:
            connection.close()

    async def _work(self, function: Callable[..., None], *args: object) -> None:
        assert self._working is None or self._working.done(), "one call at a time"
        self._working = asyncio.get_running_loop().run_in_executor(self._pool.threads, function, *args)
        # Cancelling the caller does not end the thread; aclose waits for it.
        await asyncio.shield(self._working)

    def _open_connection(self) -> Connection:
        if self._connection is None:
            raise UnavailableError("this transfer is not open", reason="TRANSFER_ABORTED", stage="transfer")
        return self._connection

    def _open(self, connection: Connection) -> None:
        with self._telling(connection):
            connection.send([self._opening])
            self._receive_ack(connection)

    def _send(
        self, connection: Connection, first_index: int, block_ids: Sequence[int], block_hashes: Sequence[BlockHash]
    ) -> None:
        step = self._pool.link.blocks_per_part(self._memory.block_bytes)
        for start in range(0, len(block_ids), step):
            part = block_ids[start : start + step]
            with self._telling(connection):
                if connection.poll(0):
                    # The receiver speaks before the end only to refuse.
                    self._receive_ack(connection)
                self._num_bytes += self._pool.link.send_part(
                    connection, self._memory, first_index + start, part, block_hashes[start + len(part) - 1]
                )
            self._num_parts += 1

    def _finish(self, connection: Connection) -> None:
        with self._telling(connection):
            connection.send([Frame(FrameType.FINISH, count=self._num_parts, num_bytes=self._num_bytes).pack()])
            self._receive_ack(connection)

    @contextlib.contextmanager
    def _telling(self, connection: Connection) -> Iterator[None]:
        """Turns a broken connection into the refusal that the receiver sent before it broke, if it did."""
        try:
            yield
        except OSError as error:
            if not isinstance(error, TimeoutError):
                with contextlib.suppress(OSError):
                    self._receive_ack(connection)
            raise UnavailableError(
                f"the KV connection to {self._address} broke: {error}", reason="RECEIVER_LOST", stage="transfer"
            ) from error

    def _receive_ack(self, connection: Connection) -> None:
        """Returns at an ACK of all that was sent; raises what a NACK says."""
        frame = connection.receive_answer()
        if frame.type is FrameType.NACK:
            raise parse_nack(connection.receive_body(frame.num_bytes))
        if frame.type is not FrameType.ACK or (frame.count, frame.num_bytes) != (self._num_parts, self._num_bytes):
            raise CorruptionError(f"unexpected {frame.type.name}", reason="KV_PROTOCOL", stage="transfer")
