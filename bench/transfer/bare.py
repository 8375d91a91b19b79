"""What a transport is measured against: the same bytes over the same kind of connection, and nothing else.

No ticket, no checksum, no place in a cache: whatever a transport takes longer than this is its own.
"""

import contextlib
import socket
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from kvstore.transfer.grpc_transport import MAX_PART_BYTES

# What a bare pair hands to the system at a time; measured to be best for it.
TARGET_PART_BYTES = 2 * 1024 * 1024

_METHOD = "/bench.Bare/Push"


class BareSockets:
    """Listens on TCP and on a Unix socket; whoever connects fills `target` again and again, and is told each time."""

    def __init__(self, target: memoryview) -> None:
        self._target = target
        self._directory = tempfile.TemporaryDirectory(prefix="pdmesh-bench-")
        path = str(Path(self._directory.name) / "bare")
        self._listeners = {
            "tcp": socket.create_server(("127.0.0.1", 0)),
            "unix": socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
        }
        self._listeners["unix"].bind(path)
        self._listeners["unix"].listen()
        self.addresses = {"tcp": f"127.0.0.1:{self._listeners['tcp'].getsockname()[1]}", "unix": path}
        for listener in self._listeners.values():
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        for listener in self._listeners.values():
            listener.close()
        self._directory.cleanup()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._fill, args=(connection,), daemon=True).start()

    def _fill(self, connection: socket.socket) -> None:
        with connection:
            while header := connection.recv(8, socket.MSG_WAITALL):
                left = self._target[: int.from_bytes(header, "little")]
                while left:
                    count = connection.recv_into(left[:TARGET_PART_BYTES])
                    if not count:
                        return
                    left = left[count:]
                connection.sendall(b"\0")


class BareSocket:
    """The sending end of one connection."""

    def __init__(self, kind: str, address: str) -> None:
        if kind == "unix":
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.connect(address)
        else:
            host, _, port = address.rpartition(":")
            self._socket = socket.create_connection((host, int(port)))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def move(self, source: memoryview) -> None:
        """Sends all of `source`, and returns when it has been received."""
        self._socket.sendall(len(source).to_bytes(8, "little"))
        for start in range(0, len(source), TARGET_PART_BYTES):
            part = source[start : start + TARGET_PART_BYTES]
            while part:
                part = part[self._socket.sendmsg([part]) :]
        if not self._socket.recv(1):
            raise ConnectionError("the receiver closed the connection")

    def close(self) -> None:
        self._socket.close()


class BareStreams(grpc.GenericRpcHandler):
    """The gRPC side: parts of a stream, as large as the transport's, laid into `target` one after the other."""

    def __init__(self, target: memoryview) -> None:
        self._target = target

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        return grpc.stream_unary_rpc_method_handler(self._push) if details.method == _METHOD else None

    async def _push(self, parts: AsyncIterator[bytes], context: object) -> bytes:
        end = 0
        async for part in parts:
            self._target[end : end + len(part)] = part
            end += len(part)
        return end.to_bytes(8, "little")


async def move_by_stream(channel: grpc.aio.Channel, source: memoryview) -> None:
    """Sends all of `source` to a `BareStreams`, and returns when it has been received."""
    call: grpc.aio.StreamUnaryCall[bytes, bytes] = channel.stream_unary(_METHOD)()
    for start in range(0, len(source), MAX_PART_BYTES):
        await call.write(bytes(source[start : start + MAX_PART_BYTES]))
    await call.done_writing()
    assert int.from_bytes(await call, "little") == len(source)
