"""Supervisors as real processes, each with the ranks of one node, for tests that kill them and theirs."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from pdmesh.ranks.config import GroupConfig
from tests import rank_child

_SUPERVISE = """
import json, logging, sys
from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.supervisor import supervise
logging.basicConfig(level="INFO", format="%(message)s")
sys.exit(supervise(GroupConfig(**json.loads(sys.argv[1])), [sys.executable, *sys.argv[2:]], "test"))
"""


def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> float:
    """Returns the seconds until `condition` holds; AssertionError where it does not come about."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + timeout_s, f"never came about: {what}"
        time.sleep(0.01)
    return time.monotonic() - begun


class Node:
    """A supervisor and its ranks; they tell of themselves in `directory`, which the nodes of a group share.

    Use as a context manager: at its end everything is killed, and nothing may be left of it.

    Args:
        config: This node's.
        directory: For what the ranks write, and for its log.
        misdeed: A rank, a generation and what that does wrong; see `rank_child`.
        note: Tells its log from that of another node of its number.
    """

    def __init__(self, config: GroupConfig, directory: Path, *misdeed: object, note: str = "") -> None:
        self.config, self.directory = config, directory
        self.log_path = directory / f"log-{config.node_rank}{note}"
        self._arguments = [rank_child.__file__, str(directory), *map(str, misdeed)]

    def __enter__(self) -> Self:
        arguments = [json.dumps(dataclasses.asdict(self.config)), *self._arguments]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", _SUPERVISE, *arguments], stderr=log, stdout=log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            print(self.log_path.read_text())
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Takes away what its ranks wrote, once its supervisor is dead and they with it."""
        for path in [*self.directory.glob("*-rank-*")]:
            fact = json.loads(path.read_text())
            if fact["supervisor"] == self.process.pid:
                # What a rank started ends with it where its supervisor lives to see to that.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(fact["beside"], signal.SIGKILL)
                until(functools.partial(_is_dead, fact["pid"]), "ranks die with their supervisor", 1.0)
                path.unlink()

    def said(self, generation: int, what: str) -> Any:
        """What a rank wrote as `what`; None while it has not."""
        path = self.directory / f"{generation}-{what}"
        return json.loads(path.read_text()) if path.exists() else None

    def ready(self, generation: int) -> None:
        """Returns when the group of that generation serves."""
        until(lambda: (self.directory / f"{generation}-ready").exists(), f"generation {generation} serves")

    def rank(self, generation: int, rank: int) -> int:
        """The pid of a rank that has started."""
        return int(self.said(generation, f"rank-{rank}")["pid"])

    def place(self, generation: int, rank: int) -> dict[str, Any]:
        return dict(self.said(generation, f"rank-{rank}")["place"])

    def is_gone(self, generation: int) -> bool:
        """No rank of this node in that generation is left, not even as a zombie, nor what one started."""
        facts = [self.said(generation, f"rank-{rank}") for rank in self.config.local_ranks]
        return not any(is_alive(pid) for fact in facts if fact for pid in (fact["pid"], fact["beside"]))

    def assert_gone(self, generation: int, within_s: float = 2.0) -> None:
        until(lambda: self.is_gone(generation), f"nothing left of generation {generation}", within_s)

    def exit_code(self, timeout_s: float = 20.0) -> int:
        """The supervisor's, once it has ended."""
        return self.process.wait(timeout_s)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def num_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def is_alive(pid: int) -> bool:
    # What a killed rank started is nobody's child here: as a zombie it waits for this machine's init alone.
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_dead(pid: int) -> bool:
    return not is_alive(pid)


def num_zombies(pid: int) -> int:
    """Children of a process that it has not reaped."""
    children = psutil.Process(pid).children()
    return sum(child.status() == psutil.STATUS_ZOMBIE for child in children)
