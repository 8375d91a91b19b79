"""A group of ranks in processes of their own, as the bench holds it: see leading.py."""

import json
import select
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.parallel.leading import Leading

_ROOT = Path(__file__).resolve().parents[2]
# Loading and the longest prompts take seconds.
_REPLY_TIMEOUT_S = 300.0
_EXIT_TIMEOUT_S = 30.0


class Group:
    """Starts with the constructor, and ends with the context. What it prints besides goes where the bench's does.

    Every method raises RuntimeError where the process is gone, or says nothing for minutes.

    Attributes:
        ranks: What the group says of each of them, once `wait_ready` has returned; of an engine alone, nothing.
        before_bytes: Resident in the leader's process before it loaded anything.
    """

    def __init__(self, leading: Leading) -> None:
        self._name = f"{Path(leading.model).name}, {leading.tp or 1} ranks"
        self.ranks: list[dict[str, Any]] = []
        self.before_bytes = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.parallel.leading", json.dumps(asdict(leading))],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def wait_ready(self) -> None:
        said = self._hear()
        self.ranks, self.before_bytes = said["ranks"], said["before_bytes"]

    def decode(self, num_running: int) -> None:
        """Has so many requests decode."""
        self._tell({"running": num_running})
        self._hear()

    def begin(self, num_steps: int) -> None:
        """Has it go so many steps, and returns at once."""
        self._tell({"steps": num_steps})

    def seconds(self) -> float:
        """That the steps of `begin` took; waits for their end."""
        return float(self._hear()["seconds"])

    def _tell(self, order: dict[str, int]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"{self._name}: the process ended; see above what it printed") from None

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _REPLY_TIMEOUT_S)[0]:
            raise RuntimeError(f"{self._name}: no answer in {_REPLY_TIMEOUT_S:.0f} s: is there memory for it?")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name}: the process ended; see above what it printed")
        reply: dict[str, Any] = json.loads(line)
        return reply
