"""An engine in a process of its own, spoken to by JSON lines; peers/adapter.py describes the messages."""

import contextlib
import json
import os
import select
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from bench.engine.installed import Installed
from bench.engine.peers.adapter import LoadRequest
from pdmesh.errors import ConfigError

_ROOT = Path(__file__).resolve().parents[2]
# vLLM compiles while it loads; no single measurement takes as long.
_REPLY_TIMEOUT_S = 600.0
_EXIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Measured:
    """An engine's answer to one measurement."""

    tokens_per_s: float
    first_tokens: tuple[int, ...]


class EngineProcess:
    """Starts with the constructor, and ends with the context.

    Attributes:
        ready_s: Seconds that `load` took in the engine.
        version: What is measured, as it calls itself.
    """

    def __init__(self, installed: Installed, log: Path) -> None:
        self.name = installed.name
        self.ready_s = 0.0
        self.version = ""
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(installed.python), "-m", installed.module],
                cwd=_ROOT,
                env={**os.environ, **installed.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, request: LoadRequest) -> None:
        """Raises ConfigError where the engine cannot."""
        reply = self._ask({"load": asdict(request)})
        self.ready_s, self.version = float(reply["ready_s"]), str(reply["version"])

    def measure(self, request: Mapping[str, int]) -> Measured:
        """Raises ConfigError where the engine fails."""
        return parse_measured(self._ask(request))

    def cpu_s(self) -> float:
        """Processor time of the process and its children so far."""
        process = psutil.Process(self._process.pid)
        family = [process, *process.children(recursive=True)]
        return sum(times.user + times.system for times in (member.cpu_times() for member in family))

    def close(self) -> None:
        """Ends the process; idempotent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # What it did not read any more is lost with it.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("it ended") from None
        if not select.select([self._process.stdout], [], [], _REPLY_TIMEOUT_S)[0]:
            raise self._failed(f"no answer in {_REPLY_TIMEOUT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failed("it ended")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failed(reply["error"])
        return reply

    def _failed(self, cause: str) -> ConfigError:
        return ConfigError(f"{self.name} failed: {cause}; what it printed is in {self._log}")


def parse_measured(reply: Mapping[str, Any]) -> Measured:
    return Measured(float(reply["tokens_per_s"]), tuple(reply["first_tokens"]))
