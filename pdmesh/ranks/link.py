"""A connection between the supervisors of two nodes: lines of JSON, and a heartbeat both ways.

An empty object is a heartbeat. Silence and a closed connection mean the same: the node at the other end is lost.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

from pdmesh.errors import UnavailableError

BEAT_S = 0.25
SILENCE_S = 1.25
_MAX_LINE_BYTES = 16 * 1024
_MAX_WAITING = 100

Message = dict[str, Any]


class Link(asyncio.Protocol):
    """For `loop.create_connection` and `create_server`; beats from its making until it is lost or closed.

    Args:
        on_made: Called once connected.
    """

    def __init__(self, on_made: "Callable[[Link], None] | None" = None) -> None:
        self._on_made = on_made
        self._loop = asyncio.get_running_loop()
        self._partial = b""
        self._waiting: asyncio.Queue[Message | None] = asyncio.Queue()
        self._lost_because: str | None = None

    @property
    def lost(self) -> bool:
        """Lost, or closed by this side."""
        return self._lost_because is not None

    @property
    def local_host(self) -> str:
        """This machine's address as the other end reaches it."""
        return str(self._transport.get_extra_info("sockname")[0])

    @property
    def peer_host(self) -> str:
        return str(self._transport.get_extra_info("peername")[0])

    def send(self, message: Message) -> None:
        """Sends a line; does nothing where the link is lost."""
        if not self.lost:
            self._transport.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> Message:
        """The next message. Raises UnavailableError, which says why, once the link is lost and all before is read."""
        message = await self._waiting.get()
        if message is None:
            self._waiting.put_nowait(None)
            raise UnavailableError(self._lost_because or "")
        return message

    def close(self) -> None:
        """Ends it after what was sent. Idempotent."""
        if not self.lost:
            self._end("closed by this side")
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._heard_at = self._loop.time()
        self._beat()
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        *lines, self._partial = (self._partial + data).split(b"\n")
        if max(map(len, (*lines, self._partial))) > _MAX_LINE_BYTES or self._waiting.qsize() > _MAX_WAITING:
            self._lose("it sent more than any supervisor does")
            return
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self._lose("it sent what no supervisor sends")
                return
            if message:
                self._waiting.put_nowait(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose("the connection was closed" if exc is None else f"the connection broke: {exc}")

    def _beat(self) -> None:
        silent_s = self._loop.time() - self._heard_at
        if silent_s >= SILENCE_S:
            self._lose(f"silent for {SILENCE_S:g} s")
            return
        self.send({})
        self._timer = self._loop.call_later(min(BEAT_S, SILENCE_S - silent_s), self._beat)

    def _lose(self, reason: str) -> None:
        if not self.lost:
            self._end(reason)
            self._transport.abort()

    def _end(self, reason: str) -> None:
        self._lost_because = reason
        self._timer.cancel()
        self._waiting.put_nowait(None)
