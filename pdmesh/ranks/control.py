"""A rank's line to its supervisor: each packet of a Unix socket is one JSON object.

    rank -> supervisor    {"ready": true}                      rank 0 only: the group serves
                          {"failed": text, "fatal": bool}      why this rank ends
    supervisor -> rank    {"down": text}                       rank 0 only: why the group ends

The socket's end is the end of the process that held the other one.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable

# Far below what a socket buffer takes, so that a packet never waits.
MAX_MESSAGE_CHARS = 2000
PACKET_BYTES = 64 * 1024


class RankControl:
    """Used in a rank's process; thread-safe.

    Args:
        fd: `RankPlace.control_fd`, which is this object's from now on.
        on_down: Called once, on this object's thread, with the reason why the group ends: its supervisor says so, or
            is itself gone. The process has well under a second left to tell its clients and exit.
    """

    def __init__(self, fd: int, on_down: Callable[[str], None]) -> None:
        self._socket = socket.socket(fileno=fd)
        self._on_down = on_down
        threading.Thread(target=self._listen, name="rank-control", daemon=True).start()

    def ready(self) -> None:
        """Rank 0: the group serves."""
        self._send({"ready": True})

    def failed(self, message: str, *, fatal: bool) -> None:
        """Why this rank ends; it exits next.

        Args:
            message: One line.
            fatal: A person must mend something (a ConfigError): the group is not started again, and its supervisor
                prints why, once for all ranks that found it.
        """
        self._send({"failed": message[:MAX_MESSAGE_CHARS], "fatal": fatal})

    def _send(self, message: dict[str, object]) -> None:
        # A supervisor that is gone needs no telling, and `on_down` says that it is.
        with contextlib.suppress(OSError):
            self._socket.send(json.dumps(message).encode())

    def _listen(self) -> None:
        with self._socket:
            try:
                packet = self._socket.recv(PACKET_BYTES)
            except OSError:
                packet = b""
            self._on_down(json.loads(packet)["down"] if packet else "the supervisor of its ranks is gone")
