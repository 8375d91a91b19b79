"""What the workers' journals hold reaches whoever asks the router, and whoever reads a worker's metrics."""

import asyncio
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.config import EngineConfig
from kvstore.tiers.config import TierConfig
from pdmesh.config import ServiceConfig
from pdmesh.errors import UnavailableError
from pdmesh.transfers import Direction, Outcome, TransferReport
from tests.mesh import Mesh
from worker.config import WorkerConfig


async def test_the_router_tells_what_every_worker_knows(tiny_model: Path) -> None:
    async with Mesh(tiny_model) as mesh:
        idle = await mesh.client.transfers()
        assert [(worker.worker_id, worker.error) for worker in idle] == [("decode-0", ""), ("prefill-0", "")]
        assert all(worker.report == TransferReport() for worker in idle)

        journal = mesh.decodes[0].host.journal
        entry = journal.begin(Direction.RECEIVING, "r2", "prefill-0", "tcp", num_blocks=2, num_bytes=512)
        entry.state = "waiting for the sender"
        lost = journal.begin(Direction.RECEIVING, "r1", "prefill-0", "shm", num_blocks=1, num_bytes=256)
        lost.fail(UnavailableError("gone", reason="SENDER_LOST"), num_bytes=16, num_parts=1, duration_s=0.5)
        journal.note_choice("prefill-0", "tcp", "shm: not on this host")
        journal.note_fallback("shm", "tcp", "SENDER_LOST")
        engine = mesh.decodes[0].host.engine
        lease = await engine.acquire_prefix([1, 2, 3], b"")

        decode, prefill = await mesh.client.transfers()
        assert prefill.report == TransferReport()
        report = decode.report
        assert report is not None
        assert (report.num_live, report.num_tickets, report.num_leases) == (1, 0, 1)
        (live,) = report.live
        assert (live.request_id, live.state, live.num_bytes) == ("r2", "waiting for the sender", 512)
        (failure,) = report.failures
        assert (failure.outcome, failure.reason, failure.num_bytes) == (Outcome.LOST, "SENDER_LOST: gone", 16)
        assert 0 <= failure.age_s < 60
        assert [(choice.peer, choice.transport) for choice in report.choices] == [("prefill-0", "tcp")]
        assert [(fallback.reason, fallback.count) for fallback in report.fallbacks] == [("SENDER_LOST", 1)]

        assert mesh.decodes[0].host.info.kv_transports == "tcp"
        async with asyncio.timeout(10):
            while [view.info.kv_transports for view in await mesh.client.workers()] != ["tcp", ""]:
                await asyncio.sleep(0.05)
        entry.end(Outcome.DONE, num_bytes=512, num_parts=2, duration_s=0.1)
        await engine.release(lease)
        await mesh.assert_idle()


async def test_a_worker_and_a_router_serve_their_metrics(
    tiny_model: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    router_port, decode_port = unused_tcp_port_factory(), unused_tcp_port_factory()
    engine = EngineConfig(model=str(tiny_model), dtype="float32", num_blocks=512, num_threads=1)
    worker = WorkerConfig(ServiceConfig(metrics_port=decode_port), engine, TierConfig(), "decode-0")
    router = {"service": ServiceConfig(metrics_port=router_port)}
    async with Mesh(tiny_model, num_prefill=0, decode={"worker": worker}, router=router) as mesh:
        host = mesh.decodes[0].host
        entry = host.journal.begin(Direction.RECEIVING, "r", "prefill-0", "tcp", num_blocks=1, num_bytes=256)
        lease = await host.engine.acquire_prefix([1, 2, 3], b"")
        metrics = await asyncio.to_thread(read_metrics, decode_port)
        assert metrics["pdmesh_kv_transfers_live"] == 1
        assert (metrics["pdmesh_kv_leases"], metrics["pdmesh_kv_tickets"]) == (1, 0)
        entry.end(Outcome.DONE, num_bytes=256, num_parts=1, duration_s=0.1)
        await host.engine.release(lease)
        await mesh.assert_idle()
        metrics = await asyncio.to_thread(read_metrics, decode_port)
        assert (metrics["pdmesh_kv_transfers_live"], metrics["pdmesh_kv_leases"]) == (0, 0)
        assert metrics["pdmesh_kv_transfer_bytes_total"] == 256
        assert (await asyncio.to_thread(read_metrics, router_port))["pdmesh_router_active_requests"] == 0
    for port in (router_port, decode_port):
        with pytest.raises(OSError, match="refused"):
            await asyncio.to_thread(read_metrics, port)


def read_metrics(port: int) -> dict[str, float]:
    """The values by name; of one name with several labels, the last."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {sample.name: sample.value for family in families for sample in family.samples}
