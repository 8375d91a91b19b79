"""A proxy that does to a connection what networks do, at a chosen byte; it can prove that it did.

Speaks TCP, or to an address of transport `shm` Unix sockets, where it hands on the descriptor that the client lends.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Self

from kvstore.transfer.shm import host_id

CHUNK_BYTES = 64 * 1024
ABSTRACT = "\0pdmesh-kv/"
# A replayed connection that stays silent for so long has said all that it will.
REPLAY_SILENCE_S = 0.3

Rewrite = Callable[[bytes], bytes]


def flip(bit: int) -> Rewrite:
    """Flips one bit, 0 to 7, of the first byte."""
    return lambda data: bytes([data[0] ^ 1 << bit]) + data[1:]


def drop(count: int) -> Rewrite:
    """Loses the first bytes."""
    return lambda data: data[count:]


def repeat(count: int) -> Rewrite:
    """Sends the first bytes twice."""
    return lambda data: data[:count] + data


def swap(count: int) -> Rewrite:
    """Sends the first bytes after as many that follow them."""
    return lambda data: data[count : 2 * count] + data[:count] + data[2 * count :]


class FaultProxy:
    """Use as `async with FaultProxy(address) as proxy:` and connect to `proxy.address`.

    Faults act on the bytes from client to server, counted over all connections; set them before they are due.

    Attributes:
        rewrite_at: What comes in one piece from this byte on is passed on as `rewrite` makes it, once.
        rewrite_answer_at: The same for the bytes from server to client.
        rewrite: By default flips the lowest bit of the byte.
        cut_at: After this many bytes, both sides of the connection are closed.
        stall_at: After this many bytes nothing passes, until `resume` is called.
        reset_next: The next byte from the client is answered by a reset, once.
        bytes_per_s: No more passes, if given.
        recording: Bytes passed on are kept for `replay`.
        num_bytes: Passed on so far.
        num_answer_bytes: Passed back so far.
        num_late_bytes: Held back by the stall, and sent on their way by `resume`.
        num_connections: Accepted so far.
        num_faults: That have happened.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = _parse(upstream)
        self._name = secrets.token_hex(8)
        self.rewrite_at: int | None = None
        self.rewrite_answer_at: int | None = None
        self.rewrite: Rewrite = flip(0)
        self.cut_at: int | None = None
        self.stall_at: int | None = None
        self.reset_next = False
        self.bytes_per_s: float | None = None
        self.recording = False
        self.num_bytes = 0
        self.num_answer_bytes = 0
        self.num_late_bytes = 0
        self.num_connections = 0
        self.num_faults = 0
        self.stalled = asyncio.Event()
        self._resumed = asyncio.Event()
        self._recorded: list[bytes] = []
        self._lent: list[int] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    @property
    def address(self) -> str:
        assert self._listener is not None
        if self._listener.family == socket.AF_UNIX:
            return f"{host_id()}/{self._name}"
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def clear(self) -> None:
        """Takes back the faults that did not come about."""
        self.rewrite_at = self.rewrite_answer_at = self.cut_at = self.stall_at = None

    def resume(self) -> None:
        """Ends the stall: what was held back passes now, and all after it."""
        self.stall_at = None
        self._resumed.set()

    async def replay(self) -> bytes:
        """Sends all that was recorded once more, on a connection of its own; returns what is answered."""
        loop = asyncio.get_running_loop()
        self.recording = False
        upstream = await self._connect()
        answer = b""
        try:
            await self._pass_on(
                upstream, b"".join(self._recorded), [os.dup(descriptor) for descriptor in self._lent[:1]]
            )
            # The server may hang up, or wait for more: either way it has answered.
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(REPLAY_SILENCE_S):
                    while data := await loop.sock_recv(upstream, CHUNK_BYTES):
                        answer += data
        finally:
            upstream.close()
        return answer

    async def __aenter__(self) -> Self:
        family, _ = self._upstream
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(ABSTRACT + self._name if family == socket.AF_UNIX else ("127.0.0.1", 0))
        self._listener.listen()
        self._begin(self._accept(self._listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert self._listener is not None
        self._listener.close()
        for descriptor in self._lent:
            os.close(descriptor)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _ = await asyncio.get_running_loop().sock_accept(listener)
            self.num_connections += 1
            self._begin(self._serve(client))

    async def _connect(self) -> socket.socket:
        family, target = self._upstream
        upstream = socket.socket(family, socket.SOCK_STREAM)
        upstream.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(upstream, target)
        except BaseException:
            upstream.close()
            raise
        return upstream

    async def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                upstream = await self._connect()
            except OSError:
                # Nobody there: nor is there here, for all that the client can tell.
                return
            with upstream:
                back = asyncio.create_task(self._copy_back(upstream, client))
                try:
                    await self._copy(client, upstream)
                    upstream.shutdown(socket.SHUT_WR)
                    await back
                except OSError:
                    # One side is gone: closing takes the other along.
                    pass
                finally:
                    back.cancel()
                    await asyncio.gather(back, return_exceptions=True)

    async def _copy(self, client: socket.socket, upstream: socket.socket) -> None:
        data, lent = await self._receive_first(client)
        try:
            while data:
                await self._take(client, upstream, data, lent)
                data = await asyncio.get_running_loop().sock_recv(client, CHUNK_BYTES)
        finally:
            self._close(lent)

    async def _take(self, client: socket.socket, upstream: socket.socket, data: bytes, lent: list[int]) -> None:
        """Does to `data` what is due, and passes on what is left of it, with the descriptors lent."""
        if self.reset_next:
            self.reset_next = False
            self.num_faults += 1
            _reset(client)
            raise ConnectionResetError
        start, end = self.num_bytes, self.num_bytes + len(data)
        self.num_bytes = end
        if self.rewrite_at is not None and start <= self.rewrite_at < end:
            data = self._rewrite(data, self.rewrite_at - start)
            self.rewrite_at = None
        if self.cut_at is not None and end > self.cut_at:
            self.num_faults += 1
            await self._pass_on(upstream, data[: self.cut_at - start], lent)
            self.cut_at = None
            raise ConnectionResetError
        if self.stall_at is not None and end > self.stall_at:
            await self._pass_on(upstream, data[: self.stall_at - start], lent)
            data = data[self.stall_at - start :]
            self.num_faults += 1
            self.stalled.set()
            await self._resumed.wait()
            self.num_late_bytes += len(data)
        await self._pass_on(upstream, data, lent)
        if self.bytes_per_s is not None:
            await asyncio.sleep(len(data) / self.bytes_per_s)

    def _rewrite(self, data: bytes, at: int) -> bytes:
        self.num_faults += 1
        return data[:at] + self.rewrite(data[at:])

    async def _receive_first(self, client: socket.socket) -> tuple[bytes, list[int]]:
        """The first bytes, and the descriptor that came with them over a Unix socket."""
        loop = asyncio.get_running_loop()
        if client.family != socket.AF_UNIX:
            return await loop.sock_recv(client, CHUNK_BYTES), []
        readable = asyncio.Event()
        loop.add_reader(client, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(client)
        data, descriptors, _, _ = socket.recv_fds(client, CHUNK_BYTES, 1)
        return data, descriptors

    async def _pass_on(self, upstream: socket.socket, data: bytes, lent: list[int]) -> None:
        if self.recording and data:
            self._recorded.append(data)
        if data and lent:
            socket.send_fds(upstream, [data[:1]], lent)
            self._close(lent)
            data = data[1:]
        await asyncio.get_running_loop().sock_sendall(upstream, data)

    def _close(self, lent: list[int]) -> None:
        while lent:
            if self.recording:
                self._lent.append(lent.pop())
            else:
                os.close(lent.pop())

    async def _copy_back(self, upstream: socket.socket, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(upstream, CHUNK_BYTES):
                start, end = self.num_answer_bytes, self.num_answer_bytes + len(data)
                self.num_answer_bytes = end
                if self.rewrite_answer_at is not None and start <= self.rewrite_answer_at < end:
                    data = self._rewrite(data, self.rewrite_answer_at - start)
                    self.rewrite_answer_at = None
                await loop.sock_sendall(client, data)
            client.shutdown(socket.SHUT_WR)


def _parse(address: str) -> tuple[socket.AddressFamily, "str | tuple[str, int]"]:
    if "/" in address:
        return socket.AF_UNIX, ABSTRACT + address.partition("/")[2]
    host, _, port = address.rpartition(":")
    return socket.AF_INET, (host, int(port))


def _reset(client: socket.socket) -> None:
    """Has the closing reset the connection: it lingers for no time (socket(7)). A Unix socket is just closed."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
