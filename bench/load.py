"""Closed-loop load: a number of clients, each with one request at a time, and what they saw."""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

# Sends one prompt and yields the number of new tokens at each arrival.
Generate = Callable[[list[int]], AsyncIterator[int]]


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of random tokens, no two alike: nothing is found in a prefix cache."""

    prompt_tokens: int
    output_tokens: int
    vocab_size: int

    def prompt(self, draw: random.Random) -> list[int]:
        return [draw.randrange(self.vocab_size) for _ in range(self.prompt_tokens)]


@dataclass(slots=True)
class Seen:
    """What the clients of one run saw. Seconds."""

    duration_s: float = 0.0
    num_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    # Between one arrival and the next of a stream, divided by the tokens that came.
    itl_s: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        gaps = sorted(self.itl_s)
        return {
            "ttft_p50_ms": 1e3 * statistics.median(self.ttft_s),
            "itl_p50_ms": 1e3 * statistics.median(gaps),
            "itl_p99_ms": 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
            "tokens_per_s": self.num_tokens / self.duration_s,
        }


async def run(generate: Generate, workload: Workload, *, concurrency: int, requests: int, seed: int) -> Seen:
    """`requests` requests by `concurrency` clients. Raises RuntimeError where an answer is short."""
    draw = random.Random(seed)
    prompts = [workload.prompt(draw) for _ in range(requests)]
    seen = Seen()

    async def client() -> None:
        while prompts:
            await _one(generate, prompts.pop(), workload.output_tokens, seen)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(client())
    seen.duration_s = time.perf_counter() - began
    return seen


async def _one(generate: Generate, prompt: list[int], expected_tokens: int, seen: Seen) -> None:
    began = last = time.perf_counter()
    num_tokens = 0
    stream = generate(prompt)
    async with aclosing(stream) as arrivals:  # type: ignore[type-var]
        async for num_new in arrivals:
            now = time.perf_counter()
            if num_tokens:
                seen.itl_s.append((now - last) / num_new)
            else:
                seen.ttft_s.append(now - began)
            last = now
            num_tokens += num_new
    if num_tokens != expected_tokens:
        raise RuntimeError(f"{num_tokens} tokens came, {expected_tokens} were asked for")
    seen.num_tokens += num_tokens
