"""Metrics over HTTP."""

import asyncio
import threading
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from pdmesh.config import ServiceConfig
from pdmesh.errors import ConfigError
from pdmesh.metrics_server import MetricsServer


def read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        return str(response.read().decode())


async def test_it_serves_what_the_registry_holds_until_it_is_closed(unused_tcp_port: int) -> None:
    registry = CollectorRegistry()
    counter = Counter("apples", "Eaten.", registry=registry)
    threads_before = threading.active_count()
    server = MetricsServer("127.0.0.1", unused_tcp_port, registry)
    server.start()
    try:
        counter.inc(3)
        assert "apples_total 3.0" in await asyncio.to_thread(read, unused_tcp_port)
    finally:
        await server.aclose()
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(read, unused_tcp_port)
    await server.aclose()
    again = MetricsServer("127.0.0.1", unused_tcp_port, registry)
    again.start()
    await again.aclose()
    left = [thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
    assert len(left) <= threads_before


async def test_a_taken_port_names_the_way_out(unused_tcp_port: int) -> None:
    first = MetricsServer("127.0.0.1", unused_tcp_port, CollectorRegistry())
    first.start()
    try:
        with pytest.raises(ConfigError, match=r"in use.*another --metrics-port"):
            MetricsServer("127.0.0.1", unused_tcp_port, CollectorRegistry()).start()
    finally:
        await first.aclose()


async def test_port_0_serves_none() -> None:
    threads = threading.active_count()
    server = MetricsServer("127.0.0.1", 0, CollectorRegistry())
    server.start()
    assert threading.active_count() == threads
    await server.aclose()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="--metrics-port"):
        ServiceConfig(metrics_port=port)
