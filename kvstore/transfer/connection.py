"""A connection of transport `tcp`, `shm` or `nixl`: whole frames, on blocking threads, stoppable from any thread."""

import contextlib
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Sequence

from kvstore.transfer.frames import HEADER_BYTES, Frame

# A peer that is silent in the middle of a frame, or owes an answer, is given up after this long: the last resort, where
# neither its death nor the control stream's end was seen. Between frames a sender may compute for as long as it takes.
SILENCE_TIMEOUT_S = 10.0
# A host that vanishes without a word is noticed by TCP's own probes.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 5, 2, 3
# One call takes at most this many pieces (IOV_MAX of Linux).
MAX_PIECES = 1024
# What is still read, and dropped, from a peer that was refused in the middle of sending.
MAX_LINGER_BYTES = 64 * 1024 * 1024
LINGER_TIMEOUT_S = 1.0


class Connection:
    """Owns `sock`. One thread at a time sends and receives; `shut` may be called on any, and makes that thread fail.

    Methods raise OSError when the connection breaks, is shut or stays silent too long (TimeoutError).
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._closing = threading.Lock()
        sock.settimeout(SILENCE_TIMEOUT_S)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            _watch_peer(sock)

    def poll(self, timeout_ms: int | None) -> bool:
        """Whether something can be read, the peer's goodbye included; waits for it, without end if None."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return bool(poller.poll(timeout_ms))

    def receive_frame(self) -> Frame | None:
        """The next header, however long it takes to begin. None where the peer has closed instead."""
        self.poll(None)
        header = bytearray(HEADER_BYTES)
        if not self.receive([memoryview(header)], eof_ok=True):
            return None
        return Frame.parse(header)

    def receive_answer(self) -> Frame:
        """The next header, which the peer owes us now."""
        header = bytearray(HEADER_BYTES)
        self.receive([memoryview(header)])
        return Frame.parse(header)

    def receive_body(self, num_bytes: int) -> bytes:
        """A small body; the caller has checked its size."""
        body = bytearray(num_bytes)
        self.receive([memoryview(body)])
        return bytes(body)

    def receive(self, pieces: Sequence[memoryview], *, eof_ok: bool = False) -> bool:
        """Fills `pieces` in order. False at an end before the first byte, if `eof_ok`."""
        left = [piece for piece in pieces if len(piece)]
        begun = False
        while left:
            received = self._sock.recvmsg_into(left[:MAX_PIECES])[0]
            if not received:
                if eof_ok and not begun:
                    return False
                raise ConnectionError("the peer closed the connection")
            begun = True
            _advance(left, received)
        return True

    def receive_descriptor(self) -> tuple[Frame | None, int | None]:
        """The first header, and the file descriptor that came with it: the caller's to close."""
        self.poll(None)
        header, descriptors, _, _ = socket.recv_fds(self._sock, HEADER_BYTES, 1)
        if not header:
            return None, None
        try:
            rest = bytearray(HEADER_BYTES - len(header))
            self.receive([memoryview(rest)])
            return Frame.parse(header + rest), descriptors[0] if descriptors else None
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def send_descriptor(self, frame: bytes, descriptor: int) -> None:
        """Sends a header and lends the peer a file."""
        sent = socket.send_fds(self._sock, [frame], [descriptor])
        self.send([frame[sent:]])

    def peer_uid(self) -> int:
        """User of the process at the other end of a Unix socket, as the kernel knows it."""
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        uid: int = struct.unpack("3i", credentials)[1]
        return uid

    def send(self, pieces: Sequence[memoryview | bytes]) -> None:
        """Sends `pieces`, end to end."""
        left = [memoryview(piece) for piece in pieces if len(piece)]
        while left:
            _advance(left, self._sock.sendmsg(left[:MAX_PIECES]))

    def send_last(self, frame: bytes) -> None:
        """Sends a frame after which nothing follows, and sees to it that the peer can read it.

        A peer in the middle of sending is drained: closing on unread bytes resets the connection, and a reset may
        overtake the frame.
        """
        self.send([frame])
        self._sock.shutdown(socket.SHUT_WR)
        self._sock.settimeout(LINGER_TIMEOUT_S)
        waste = bytearray(256 * 1024)
        num_drained = 0
        while num_drained < MAX_LINGER_BYTES and (count := self._sock.recv_into(waste)):
            num_drained += count

    def shut(self) -> None:
        """Ends the connection for both sides, and wakes whoever blocks on it. Its owner closes it."""
        # The lock keeps `close` away: the system may have given a closed number to somebody else.
        with self._closing, contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._closing:
            self._sock.close()


def _advance(pieces: list[memoryview], count: int) -> None:
    """Takes the first `count` bytes off `pieces`."""
    done = 0
    while done < len(pieces) and count >= len(pieces[done]):
        count -= len(pieces[done])
        done += 1
    del pieces[:done]
    if count:
        pieces[0] = pieces[0][count:]


def _watch_peer(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
