"""The receiving end of the transports that have sockets of their own: a listener, and a thread for each connection."""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from google.protobuf.message import DecodeError

from kvstore.transfer.connection import Connection
from kvstore.transfer.frames import Frame, FrameType, pack_nack
from kvstore.transfer.tickets import Incoming, TicketTable
from pdmesh.errors import ConfigError, CorruptionError, MeshError, UnavailableError
from pdmesh.v1 import kv_transfer_pb2 as pb

log = logging.getLogger(__name__)

# Connections that a receiver serves at once, each on a thread.
MAX_CONNECTIONS = 512
ACCEPT_RETRY_S = 0.1


class PartTaker(Protocol):
    """What a transport does with the parts of one connection, on that connection's thread."""

    def begin(self) -> bool:
        """Reads what comes before the first transfer; False where the sender closed the connection instead."""
        ...

    def take(self, incoming: Incoming, frame: Frame) -> None:
        """Brings the blocks of a PART into place and verifies them. Raises MeshError or OSError."""
        ...

    def close(self) -> None:
        """The connection is over."""
        ...


class SocketReceiver:
    """Serves one transfer after the other on each connection.

    Args:
        transport: Its name.
        tickets: Who may write what.
        bind: A bound socket. Raises OSError.
        make_taker: Called for each connection.
    """

    def __init__(
        self,
        transport: str,
        tickets: TicketTable,
        bind: Callable[[], socket.socket],
        make_taker: Callable[[Connection], PartTaker],
    ) -> None:
        self._transport = transport
        self._tickets = tickets
        self._bind = bind
        self._make_taker = make_taker
        self._listener: socket.socket | None = None
        self._connections: dict[Connection, threading.Thread] = {}
        self._acceptor: threading.Thread | None = None

    @property
    def listener(self) -> socket.socket:
        assert self._listener is not None, "start the receiver first"
        return self._listener

    async def start(self) -> None:
        try:
            listener = self._bind()
            listener.listen()
        except OSError as error:
            raise ConfigError(f"cannot listen for KV: {error}; choose another --host") from error
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), name="kv-accept", daemon=True)
        self._acceptor.start()

    async def aclose(self) -> None:
        """Ends every transfer and returns when none can write any more. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        # Closing alone would leave the thread in accept(); shutting down wakes it.
        listener.shutdown(socket.SHUT_RDWR)
        assert self._acceptor is not None
        await asyncio.to_thread(self._acceptor.join)
        listener.close()
        threads = list(self._connections.items())
        for connection, _ in threads:
            connection.shut()
        for _, thread in threads:
            await asyncio.to_thread(thread.join)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
                if len(self._connections) >= MAX_CONNECTIONS:
                    log.warning("turned a KV connection away: %d are open, the limit", MAX_CONNECTIONS)
                    sock.close()
                    continue
                connection = Connection(sock)
            except OSError as error:
                if self._listener is None:
                    return
                # Out of file descriptors, or a peer that left meanwhile: those who are here go on.
                log.warning("cannot accept a KV connection: %s", error)
                time.sleep(ACCEPT_RETRY_S)
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="kv-from", daemon=True)
            self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: Connection) -> None:
        taker = self._make_taker(connection)
        try:
            if taker.begin():
                while self._serve_transfer(connection, taker):
                    pass
        except MeshError as error:
            log.warning("KV transfer refused: %s", error.message, extra={"reason": error.reason})
            with contextlib.suppress(OSError):
                connection.send_last(pack_nack(error))
        except OSError as error:
            log.debug("KV connection ended: %s", error)
        finally:
            connection.close()
            taker.close()
            del self._connections[connection]

    def _serve_transfer(self, connection: Connection, taker: PartTaker) -> bool:
        """One transfer; False where the sender closed the connection instead of beginning one."""
        frame = connection.receive_frame()
        if frame is None:
            return False
        if frame.type is not FrameType.OPEN:
            raise CorruptionError("a transfer begins with OPEN", reason="KV_PROTOCOL", stage="transfer")
        opening = _parse_opening(connection.receive_body(frame.num_bytes))
        incoming = self._tickets.redeem(
            opening.ticket,
            opening.epoch,
            opening.request_id,
            opening.sender_incarnation,
            self._transport,
            connection.shut,
        )
        try:
            connection.send([Frame(FrameType.ACK).pack()])
            while (frame := connection.receive_frame()) is not None:
                if frame.type is FrameType.PART:
                    taker.take(incoming, frame)
                elif frame.type is FrameType.FINISH:
                    incoming.finish(frame.count, frame.num_bytes)
                    ack = Frame(FrameType.ACK, count=incoming.num_parts, num_bytes=incoming.num_bytes)
                    connection.send([ack.pack()])
                    return True
                else:
                    raise CorruptionError(f"unexpected {frame.type.name}", reason="KV_PROTOCOL", stage="transfer")
            return False
        except MeshError as error:
            incoming.fail(error)
            raise
        finally:
            incoming.fail(UnavailableError("the sender was lost", reason="SENDER_LOST", stage="transfer"))


def _parse_opening(body: bytes) -> pb.PushOpen:
    try:
        return pb.PushOpen.FromString(body)
    except DecodeError as error:
        raise CorruptionError("an OPEN that cannot be read", reason="KV_PROTOCOL", stage="transfer") from error
