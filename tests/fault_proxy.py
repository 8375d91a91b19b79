"""A TCP proxy that does to a connection what networks do, at a chosen byte; it can prove that it did."""

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Self


class FaultProxy:
    """Use as `async with FaultProxy("host:port") as proxy:` and connect to `proxy.address`.

    Faults act on the bytes from client to server, counted over all connections; set them before they are due.

    Attributes:
        flip_at: The byte at this position has its lowest bit flipped.
        cut_at: After this many bytes, both sides of the connection are closed.
        stall_at: After this many bytes nothing passes, until `resume` is called.
        reset_next: The next byte from the client is answered by a reset, once.
        num_bytes: Passed on so far.
        num_late_bytes: Held back by the stall, and sent on their way by `resume`.
        num_connections: Accepted so far.
        num_faults: That have happened.
    """

    def __init__(self, upstream: str) -> None:
        self._host, _, port = upstream.rpartition(":")
        self._port = int(port)
        self.flip_at: int | None = None
        self.cut_at: int | None = None
        self.stall_at: int | None = None
        self.reset_next = False
        self.num_bytes = 0
        self.num_late_bytes = 0
        self.num_connections = 0
        self.num_faults = 0
        self.stalled = asyncio.Event()
        self._resumed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._transports: list[asyncio.WriteTransport] = []
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def resume(self) -> None:
        """Ends the stall: what was held back passes now, and all after it."""
        self.stall_at = None
        self._resumed.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transport in self._transports:
            transport.abort()
        # An aborted transport lets go of its socket in the loop's next round.
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.num_connections += 1
        self._transports.append(writer.transport)
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        self._transports.append(up_writer.transport)
        back = asyncio.create_task(self._copy_back(up_reader, writer))
        try:
            await self._copy(reader, writer, up_writer)
            up_writer.write_eof()
            await back
        except OSError:
            # One side is gone: so is the other, for all that it can tell.
            writer.transport.abort()
            up_writer.transport.abort()
        finally:
            back.cancel()
            await asyncio.gather(back, return_exceptions=True)
            for side in (writer, up_writer):
                side.close()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up_writer: asyncio.StreamWriter
    ) -> None:
        while data := bytearray(await reader.read(64 * 1024)):
            if self.reset_next:
                self.reset_next = False
                self.num_faults += 1
                _reset(writer)
                raise ConnectionResetError
            start, end = self.num_bytes, self.num_bytes + len(data)
            if self.flip_at is not None and start <= self.flip_at < end:
                data[self.flip_at - start] ^= 1
                self.num_faults += 1
            if self.cut_at is not None and end > self.cut_at:
                up_writer.write(bytes(data[: self.cut_at - start]))
                await up_writer.drain()
                self.num_faults += 1
                self.cut_at = None
                raise ConnectionResetError
            if self.stall_at is not None and end > self.stall_at:
                up_writer.write(bytes(data[: self.stall_at - start]))
                await up_writer.drain()
                del data[: self.stall_at - start]
                self.num_faults += 1
                self.stalled.set()
                await self._resumed.wait()
                self.num_late_bytes += len(data)
            up_writer.write(bytes(data))
            await up_writer.drain()
            self.num_bytes = end

    async def _copy_back(self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await up_reader.read(64 * 1024):
                writer.write(data)
                await writer.drain()
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
