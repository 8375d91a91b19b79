"""How much memory processes hold over time, and what else of the system's they hold. Linux: it is read from /proc."""

import asyncio
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

_INTERVAL_S = 0.5


class MemoryWatch:
    """Samples the resident memory of processes, by name, against the number of requests that ended.

    Their own memory (RssAnon of proc_pid_status(5)): what a decode worker maps of others' comes and goes with its
    connections.
    """

    def __init__(self, pids: Mapping[str, int], num_ended: Callable[[], int]) -> None:
        self._pids = pids
        self._num_ended = num_ended
        self._samples: dict[str, list[tuple[int, int]]] = {name: [] for name in pids}

    async def run(self) -> None:
        """Until cancelled. Raises OSError where one of them has ended."""
        while True:
            for name, pid in self._pids.items():
                self._samples[name].append((self._num_ended(), _anonymous_kib(pid)))
            await asyncio.sleep(_INTERVAL_S)

    def slopes(self) -> dict[str, float]:
        """KiB per 100 requests: the least-squares line through all samples of each process."""
        found = {}
        for name, samples in self._samples.items():
            ended, kib = zip(*samples, strict=True)
            found[name] = statistics.linear_regression(ended, kib).slope * 100
        return found


def _anonymous_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def lent_memory(pid: int) -> set[str]:
    """Inodes of the KV memory files that a process has mapped: its own, or what others lent to it."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:pdmesh-kv" in line}


def dead_sockets(pid: int) -> list[str]:
    """TCP connections whose peer has closed them, but this process has not."""
    connections = psutil.Process(pid).net_connections(kind="tcp")
    return [str(connection) for connection in connections if connection.status == psutil.CONN_CLOSE_WAIT]
