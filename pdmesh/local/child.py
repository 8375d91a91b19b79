"""One process of a local cluster: started with a log of its own, ended with it."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pdmesh.local import die_with_parent

_TAIL_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A process to run. `env` is added to this process's own."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


class ChildProcess:
    """Runs `spec`, again after `start`; what it prints goes to `<run_dir>/<name>.log`.

    The child leads a session of its own, so that Ctrl-C on our terminal reaches us alone, and dies when we do. Must
    be started on a thread that lives as long as this process: the main one.
    """

    def __init__(self, spec: ChildSpec, run_dir: Path) -> None:
        self.spec = spec
        self.log_path = run_dir / f"{spec.name}.log"
        self.started_at = 0.0
        self._process: asyncio.subprocess.Process | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts it; at most one process at a time."""
        assert not self.running, f"{self.name} runs already"
        guard = (sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid()))
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *guard,
                *self.spec.command,
                env={**os.environ, **self.spec.env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started_at = time.monotonic()

    async def wait(self) -> int:
        """The exit code; minus the signal's number where one ended it. What it started itself does not outlive it."""
        assert self._process is not None, f"{self.name} was not started"
        exit_code = await self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return exit_code

    async def stop(self, grace_s: float) -> None:
        """Asks it to end, then makes it; returns when it has. Idempotent."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.wait(), grace_s)
        except TimeoutError:
            self.kill()
            await self.wait()

    def kill(self) -> None:
        """Ends it at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def last_words(self, num_lines: int = 15) -> list[str]:
        """The last lines of its log, for a person. A process that could say what to mend says it in one line."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
        lines = [readable for line in text.splitlines() if (readable := _readable(line))]
        if lines and lines[-1].startswith("pdmesh: "):
            return [lines[-1].removeprefix("pdmesh: ")]
        return lines[-num_lines:]


def _readable(line: str) -> str:
    """A log line without its JSON; any other line as it is."""
    try:
        record = json.loads(line)
    except ValueError:
        return line.rstrip()
    if not isinstance(record, dict) or "message" not in record:
        return line.rstrip()
    return f"{record.get('level', '')} {record['message']} {record.get('exception', '')}".strip()


def how_it_ended(exit_code: int) -> str:
    """An exit code in words."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"
