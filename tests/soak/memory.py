"""How much memory processes hold over time, and what else of the system's they hold."""

import asyncio
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

_INTERVAL_S = 0.5


class MemoryWatch:
    """Samples the resident memory of processes, by name, against the number of requests that ended."""

    def __init__(self, pids: Mapping[str, int], num_ended: Callable[[], int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._num_ended = num_ended
        self._samples: dict[str, list[tuple[int, int]]] = {name: [] for name in pids}

    async def run(self) -> None:
        """Until cancelled. Raises psutil.NoSuchProcess where one of them ends."""
        while True:
            for name, process in self._processes.items():
                self._samples[name].append((self._num_ended(), process.memory_info().rss))
            await asyncio.sleep(_INTERVAL_S)

    def slopes(self) -> dict[str, float]:
        """KiB per 100 requests: the least-squares line through all samples of each process."""
        found = {}
        for name, samples in self._samples.items():
            ended, rss = zip(*samples, strict=True)
            found[name] = statistics.linear_regression(ended, rss).slope * 100 / 1024
        return found


def lent_memory(pid: int) -> set[str]:
    """Inodes of the KV memory files that a process has mapped: its own, or what others lent to it."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:pdmesh-kv" in line}


def dead_sockets(pid: int) -> list[str]:
    """TCP connections whose peer has closed them, but this process has not."""
    connections = psutil.Process(pid).net_connections(kind="tcp")
    return [str(connection) for connection in connections if connection.status == psutil.CONN_CLOSE_WAIT]
