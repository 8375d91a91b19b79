"""What must be true once nothing is asked of anybody: every scenario test ends on these."""

import asyncio
import time
from collections.abc import Iterable

import grpc

from engine.api import Engine
from pdmesh.channels import ChannelPool
from pdmesh.types import WorkerInfo
from pdmesh.v1 import cluster_pb2, cluster_pb2_grpc


async def assert_engine_idle(engine: Engine, within_s: float = 1.0) -> None:
    """No request, no lease, every block free: at the latest `within_s` from now, for closing works between steps."""
    deadline = time.monotonic() + within_s
    while not _idle(engine) and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    status, load = engine.status(), engine.load()
    assert (status.num_requests, status.num_leases) == (0, 0), f"still held: {status}"
    assert status.num_free_blocks == status.num_blocks, f"blocks leaked: {status}"
    assert (load.num_running, load.num_waiting, load.num_queued_tokens) == (0, 0, 0), f"load of nobody: {load}"


def _idle(engine: Engine) -> bool:
    status = engine.status()
    return not status.num_requests and not status.num_leases and status.num_free_blocks == status.num_blocks


async def held_by_workers(workers: Iterable[WorkerInfo], channels: ChannelPool) -> str:
    """What worker processes still hold, for a person; empty when they are idle. Who does not answer holds nothing."""
    found = []
    for worker in workers:
        stub = cluster_pb2_grpc.WorkerStub(channels.get(worker.address))
        try:
            status = await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=5)
        except grpc.aio.AioRpcError:
            continue
        busy = (status.num_requests, status.num_leases, status.num_tickets, status.num_request_tasks)
        load = status.info.load
        if any(busy) or load.num_free_blocks != load.num_blocks:
            found.append(f"{worker.worker_id}: {busy}, {load.num_free_blocks} of {load.num_blocks} blocks free")
    return "; ".join(found)
