"""Where ranks leave each other the addresses at which torch.distributed connects them: a few values, at the leader.

torch's own TCPStore takes any caller, and asks for the names of all addresses, which takes 10 s where no name server
answers. Here a follower shows the group's token first.
"""

import base64
import contextlib
import hmac
import json
import os
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
    """This rank's end of its group's store."""
    if place.store_fd is not None:
        # The place's descriptor stays whose it was: not every group needs a store.
        return LeaderStore(socket.socket(fileno=os.dup(place.store_fd)), place.token)
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
        with sock, contextlib.suppress(OSError, ValueError, KeyError, TypeError), sock.makefile("rwb") as stream:
            sock.settimeout(_GREETING_TIMEOUT_S)
            if not hmac.compare_digest(stream.readline(_MAX_LINE_BYTES).strip(), self._token.encode()):
                return
            asked = json.loads(stream.readline(_MAX_LINE_BYTES))
            stream.write(json.dumps(answers[asked["do"]](asked)).encode() + b"\n")


class FollowerStore(Store):
    """Asks the leader. Raises RuntimeError, as torch's own stores do, where that is gone.

    Each question has a connection of its own: torch asks on several threads, and one may wait for what another sets.
    """

    def __init__(self, host: str, port: int, token: str) -> None:
        super().__init__()
        self._host, self._port, self._token = host, port, token

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
            with socket.create_connection((self._host, self._port)) as sock, sock.makefile("rwb") as stream:
                stream.write(f"{self._token}\n{json.dumps(asked)}\n".encode())
                stream.flush()
                answer = stream.readline(_MAX_LINE_BYTES)
        except OSError as error:
            raise RuntimeError(f"rank 0 cannot be reached at {self._host}:{self._port}: {error}") from error
        if not answer:
            raise RuntimeError("rank 0 closed the connection")
        return json.loads(answer)
