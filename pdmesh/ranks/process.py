"""One rank's process, as its supervisor sees it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pdmesh.local import die_with_parent
from pdmesh.ranks.control import PACKET_BYTES
from pdmesh.ranks.place import ENV_NAME, RankPlace


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What a rank says of its own end."""

    message: str
    fatal: bool


class RankProcess:
    """Starts `command` as the rank at `place`. It dies when this process does.

    It leads a process group of its own: what it started ends with it, and a terminal's Ctrl-C reaches the supervisor
    alone, which passes it on to rank 0 once. Must be made on a thread that lives as long as this process, in the loop.

    Args:
        place: Names the descriptors that it inherits, which are open now and may be closed after.
        control: The other end of `place.control_fd`; this object's from now on.
    """

    def __init__(self, place: RankPlace, command: Sequence[str], control: socket.socket) -> None:
        self.rank = place.rank
        self.control = control
        self.failure: RankFailure | None = None
        self.is_ready = False
        self.is_stopped = False
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        guard = (sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid()))
        self._process = subprocess.Popen(
            (*guard, *command),
            env={**os.environ, ENV_NAME: place.to_json()},
            stdin=subprocess.DEVNULL,
            pass_fds=place.descriptors,
            process_group=0,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        """Neither ended nor standing still."""
        return not self.exited.done() and not self.is_stopped

    def look(self) -> bool:
        """Takes note of what it said and of how it is. True: it has ended, all that it said is read; `end` it."""
        state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        self.hear()
        self.is_stopped = state is not None and state.si_code == os.CLD_STOPPED
        return state is not None and not self.is_stopped

    def hear(self) -> bool:
        """Takes note of what it said. True: it will say no more."""
        while True:
            try:
                packet = self.control.recv(PACKET_BYTES)
            except BlockingIOError:
                return False
            except OSError:
                return True
            if not packet:
                return True
            message = json.loads(packet)
            if "failed" in message:
                self.failure = RankFailure(message["failed"], message["fatal"])
            else:
                self.is_ready = True

    def end(self) -> None:
        """Ends it, if it has not ended, and what it started; returns when it is reaped."""
        # Before it is reaped: until then nobody else can have its process group's number.
        self.kill()
        self.exited.set_result(self._process.wait())
        self.control.close()

    def tell_down(self, reason: str) -> None:
        """Tells it why the group ends."""
        with contextlib.suppress(OSError):
            self.control.send(json.dumps({"down": reason}).encode())

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the rank itself, unless it has ended."""
        if not self.exited.done():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it and what it started, at once; whoever looks sees the end."""
        if not self.exited.done():
            os.killpg(self.pid, signal.SIGKILL)
