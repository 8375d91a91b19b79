"""What the processes of a cluster say of the KV that they gave and took, read from their /metrics."""

import asyncio
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, fields

from prometheus_client.parser import text_string_to_metric_families

_POLL_S = 0.05
# So many equal readings in a row: nothing is on its way any more.
_NUM_EQUAL = 4


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one process since its start, or between two readings: blocks given by each tier and stored in it, KV bytes."""

    host_hits: int = 0
    disk_hits: int = 0
    host_stored: int = 0
    disk_stored: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0

    def since(self, before: "Counts") -> "Counts":
        return Counts(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})


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


async def settled(ports: Mapping[str, int], timeout_s: float = 30.0) -> dict[str, Counts]:
    """The counts of every process, by name, once they stand still. Raises TimeoutError where they do not."""
    async with asyncio.timeout(timeout_s):
        last, num_equal = await _read(ports), 1
        while num_equal < _NUM_EQUAL:
            await asyncio.sleep(_POLL_S)
            now = await _read(ports)
            last, num_equal = now, num_equal + 1 if now == last else 1
        return last


async def _read(ports: Mapping[str, int]) -> dict[str, Counts]:
    texts = await asyncio.gather(*(asyncio.to_thread(_get, port) for port in ports.values()))
    return {name: parse(text) for name, text in zip(ports, texts, strict=True)}


def _get(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        return str(response.read().decode())


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
