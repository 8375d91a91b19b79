"""What the processes of a cluster say of the KV that they gave and took, and the system of what they read from disk."""

import asyncio
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

_POLL_S = 0.05
# So many equal readings in a row: nothing is on its way any more.
_NUM_EQUAL = 4


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one process since its start, or between two readings: blocks given by each tier and stored in it, KV bytes.

    `device_bytes` were read from a disk, by the system's count: what lay in its page cache is not among them.
    """

    host_hits: int = 0
    disk_hits: int = 0
    host_stored: int = 0
    disk_stored: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    device_bytes: int = 0

    def since(self, before: "Counts") -> "Counts":
        return Counts(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Process:
    """One to ask: the port of its /metrics."""

    pid: int
    port: int


# Metric, the label that tells, its value: our field.
_FIELDS = {
    ("pdmesh_kv_tier_hits_total", "tier", "host"): "host_hits",
    ("pdmesh_kv_tier_hits_total", "tier", "disk"): "disk_hits",
    ("pdmesh_kv_tier_stored_total", "tier", "host"): "host_stored",
    ("pdmesh_kv_tier_stored_total", "tier", "disk"): "disk_stored",
    ("pdmesh_kv_transfer_bytes_total", "direction", "sending"): "sent_bytes",
    ("pdmesh_kv_transfer_bytes_total", "direction", "receiving"): "received_bytes",
}


def parse(text: str) -> Counts:
    """The counts in what /metrics gives; of transfers, those that are done."""
    found: dict[str, int] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("outcome", "done") != "done":
                continue
            for (metric, label, value), name in _FIELDS.items():
                if sample.name == metric and sample.labels.get(label) == value:
                    found[name] = found.get(name, 0) + int(sample.value)
    return Counts(**found)


def read_from_device(proc_io: str) -> int:
    """Of what /proc/PID/io says, the bytes that came from a disk."""
    lines = dict(line.split(": ") for line in proc_io.splitlines())
    return int(lines["read_bytes"])


async def settled(processes: Mapping[str, Process], timeout_s: float = 30.0) -> dict[str, Counts]:
    """The counts of every process, by name, once they stand still. Raises TimeoutError where they do not."""
    async with asyncio.timeout(timeout_s):
        last, num_equal = await _read(processes), 1
        while num_equal < _NUM_EQUAL:
            await asyncio.sleep(_POLL_S)
            now = await _read(processes)
            last, num_equal = now, num_equal + 1 if now == last else 1
        return last


async def _read(processes: Mapping[str, Process]) -> dict[str, Counts]:
    counts = await asyncio.gather(*(asyncio.to_thread(_ask, process) for process in processes.values()))
    return dict(zip(processes, counts, strict=True))


def _ask(process: Process) -> Counts:
    with urllib.request.urlopen(f"http://127.0.0.1:{process.port}/metrics", timeout=5) as response:
        counts = parse(response.read().decode())
    return replace(counts, device_bytes=read_from_device(Path(f"/proc/{process.pid}/io").read_text()))


def free_ports(count: int) -> int:
    """The first of so many ports in a row that are free now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            first = int(probe.getsockname()[1])
        if first + count <= 65536 and all(_is_free(port) for port in range(first, first + count)):
            return first


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
