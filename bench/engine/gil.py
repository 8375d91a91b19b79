"""How long the engine's thread waits for the interpreter while an event loop of the same process is busy.

One core is left to the event loop, so that the two have nothing to share but the interpreter's lock and the memory.
"""

import asyncio
import itertools
import json
import statistics
import time

import torch

from bench.engine.decoding import decoding_core
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.engine_thread import get_interpreter_in_time

_PROMPT = 64
_STEPS = 64
_NUM_STREAMS = 32


async def measure(config: EngineConfig, *, num_running: int) -> dict[str, float]:
    """Milliseconds of a decode step, p50: with the event loop idle, with it busy, and what the second adds."""
    get_interpreter_in_time()
    core = decoding_core(config, num_running=num_running, prompt_tokens=_PROMPT, num_steps=4 * _STEPS)
    # In turns, for the machine may drift.
    idle_s: list[float] = []
    busy_s: list[float] = []
    for _ in range(2):
        idle_s += await asyncio.to_thread(_steps, core, config.num_threads)
        streams = [asyncio.create_task(_stream(number)) for number in range(_NUM_STREAMS)]
        busy_s += await asyncio.to_thread(_steps, core, config.num_threads)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    idle, busy = statistics.median(idle_s), statistics.median(busy_s)
    return {"idle_loop_ms": 1e3 * idle, "busy_loop_ms": 1e3 * busy, "wait_ms": 1e3 * (busy - idle)}


def _steps(core: EngineCore, num_threads: int | None) -> list[float]:
    """Seconds of each of some steps, on the thread that calls."""
    if num_threads is not None:
        # torch keeps it by thread.
        torch.set_num_threads(num_threads)
    durations_s = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        core.step()
        durations_s.append(time.perf_counter() - began)
        core.scheduler.drain_block_events()
    return durations_s


async def _stream(number: int) -> None:
    """A client that is sent tokens as fast as the event loop can."""
    for index in itertools.count():
        json.dumps({"id": f"stream-{number}", "choices": [{"index": 0, "text": " token", "token_ids": [index]}]})
        await asyncio.sleep(0)
