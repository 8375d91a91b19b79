"""Holding a process to one core."""

import os
from pathlib import Path


def pin(pid: int, core: int) -> None:
    """Holds every thread of a process to `core`, and with them those that they will start.

    The affinity of a process is its first thread's alone (sched_setaffinity(2)).
    """
    while free := [thread for thread in _threads(pid) if os.sched_getaffinity(thread) != {core}]:
        # A thread that is not pinned yet may start another meanwhile: look again.
        for thread in free:
            os.sched_setaffinity(thread, {core})


def _threads(pid: int) -> list[int]:
    return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
