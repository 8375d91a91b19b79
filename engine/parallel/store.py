"""Where ranks leave each other the addresses at which torch.distributed connects them: a few values, at the leader.

torch's own TCPStore takes any caller, and asks for the names of all addresses, which takes 10 s where no name server
answers. Here a follower shows the group's token first.
"""

import base64
import contextlib
import hmac
import json
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from torch.distributed.distributed_c10d import Store

from pdmesh.ranks.place import RankPlace

_MAX_LINE_BYTES: Final = 1 << 20
_GREETING_TIMEOUT_S: Final = 5.0


def open_store(place: RankPlace) -> Store:
    """This rank's end of its group's store. Raises RuntimeError where the leader cannot be reached."""
    if place.store_fd is not None:
        return LeaderStore(socket.socket(fileno=place.store_fd), place.token)
    return FollowerStore(place.leader_host, place.store_port, place.token)


class LeaderStore(Store):
    """Keeps the values; a thread for each follower answers it. Torch calls the methods on any thread."""

    def __init__(self, listener: socket.socket, token: str) -> None:
        super().__init__()
        self._token = token
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, args=(listener,), name="rank-store", daemon=True).start()

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.check(keys))

    def _accept(self, listener: socket.socket) -> None:
        with listener, contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=self._serve, args=(sock,), name="rank-store", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        answers: dict[str, Callable[[Any], object]] = {
            "set": lambda asked: self.set(asked["key"], base64.b64decode(asked["value"])),
            "get": lambda asked: base64.b64encode(self.get(asked["key"])).decode(),
            "check": lambda asked: self.check(asked["keys"]),
            "wait": lambda asked: self.wait(asked["keys"]),
        }
        with sock, sock.makefile("rwb") as stream, contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            sock.settimeout(_GREETING_TIMEOUT_S)
            if not hmac.compare_digest(stream.readline(_MAX_LINE_BYTES).strip(), self._token.encode()):
                return
            sock.settimeout(None)
            while line := stream.readline(_MAX_LINE_BYTES):
                asked = json.loads(line)
                answer = answers[asked["do"]](asked)
                stream.write(json.dumps(answer).encode() + b"\n")
                stream.flush()


class FollowerStore(Store):
    """Asks the leader. Raises RuntimeError, as torch's own stores do, where that is gone."""

    def __init__(self, host: str, port: int, token: str) -> None:
        super().__init__()
        self._asking = threading.Lock()
        try:
            self._stream = socket.create_connection((host, port)).makefile("rwb")
            self._stream.write(token.encode() + b"\n")
        except OSError as error:
            raise RuntimeError(f"rank 0 cannot be reached at {host}:{port}: {error}") from error

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._ask(do="set", key=key, value=base64.b64encode(value).decode())

    def get(self, key: str) -> bytes:
        return base64.b64decode(self._ask(do="get", key=key))

    def check(self, keys: list[str]) -> bool:
        return bool(self._ask(do="check", keys=keys))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._ask(do="wait", keys=keys)

    def _ask(self, **asked: object) -> Any:
        try:
            with self._asking:
                self._stream.write(json.dumps(asked).encode() + b"\n")
                self._stream.flush()
                answer = self._stream.readline(_MAX_LINE_BYTES)
        except OSError as error:
            raise RuntimeError(f"rank 0 is gone: {error}") from error
        if not answer:
            raise RuntimeError("rank 0 closed the connection")
        return json.loads(answer)
