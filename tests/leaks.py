"""What must be true once nothing is asked of anybody: every scenario test ends on these."""

import asyncio
import time

from engine.api import Engine


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
