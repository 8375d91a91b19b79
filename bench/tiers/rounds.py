"""One cluster, asked in turns for a prompt that is new and for one that its caches have evicted since.

new prompt n ─▶ computed        evicted prefix of prompt n - LAG, a new question ─▶ brought
"""

import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from bench.tiers.counters import Process, free_ports, settled
from bench.tiers.figures import Seen
from bench.tiers.ways import PREFIX_TOKENS, TAIL_TOKENS, Asked, Way, block_bytes
from pdmesh import AsyncClient
from pdmesh.generation import Chunk, Complete
from pdmesh.local.cluster import LocalCluster
from pdmesh.local.config import LocalConfig
from pdmesh.sampling import SamplingParams

# New prompts between a prefix and its return: two workers share them, and neither holds any of it after.
LAG = 6
# Tries for each round whose KV turned out to come from elsewhere.
_MAX_TRIES = 3
# Special tokens have the lowest ids.
_VOCABULARY = range(100, 49_000)
# More than one: the first alone is there before the decode worker has the KV, which would never arrive.
_SAMPLING = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """TTFT in seconds, prompt tokens that were not computed, and the prefill worker; "" where decode did it."""

    ttft_s: float
    cached_tokens: int
    worker_id: str


async def measure(
    way: Way, model: str, dtype: str, rounds: int, directory: Path, report: Callable[[str], None]
) -> Seen:
    """Runs a cluster for `way` until KV came from there `rounds` times.

    Raises RuntimeError where it mostly came from elsewhere.
    """
    num_bytes = block_bytes(dtype)
    settings = way.cluster(num_bytes, directory)
    metrics_port = free_ports(8)
    config = LocalConfig(model=model, port=0, dtype=dtype, num_threads=1, metrics_port=metrics_port, **settings)
    cluster = LocalCluster(config, report)
    try:
        report("starting")
        await cluster.start(lambda workers: None)
        members = [child for child in cluster.children if child.name not in ("valkey", "router")]
        processes = {
            child.name: Process(child.pid, metrics_port + place)
            for place, child in enumerate(members, start=1)
            if child.pid is not None
        }
        async with AsyncClient(cluster.address) as client:
            seen = await _rounds(way, client, processes, num_bytes, rounds, directory, report)
    finally:
        await cluster.stop()
    cluster.remove_logs()
    return seen


async def _rounds(
    way: Way,
    client: AsyncClient,
    processes: Mapping[str, Process],
    num_bytes: int,
    rounds: int,
    directory: Path,
    report: Callable[[str], None],
) -> Seen:
    draw = random.Random(0)
    seen = Seen()
    prefixes: list[list[int]] = []
    computed: list[Answer] = []
    while len(seen.brought_s) < rounds:
        if seen.num_unproven > _MAX_TRIES * rounds:
            raise RuntimeError(
                f"KV came from {way.title} {len(seen.brought_s)} times of {len(seen.brought_s) + seen.num_unproven}: "
                "--disk-dir must lie on a disk, and nothing else may use the cluster"
            )
        report(f"round {len(seen.brought_s) + 1} of {rounds}")
        prefixes.append(_tokens(draw, PREFIX_TOKENS))
        await settled(processes)
        computed.append(await _ask(client, prefixes[-1] + _tokens(draw, TAIL_TOKENS)))
        if computed[-1].cached_tokens:
            raise RuntimeError("a new prompt was found in a cache: what was measured as computing is not")
        place = len(prefixes) - 1 - LAG
        if place < 0:
            continue
        before = await settled(processes)
        _forget_files(directory)
        answer = await _ask(client, prefixes[place] + _tokens(draw, TAIL_TOKENS))
        given = {name: counts.since(before[name]) for name, counts in (await settled(processes)).items()}
        if way.proves(Asked(given, answer.cached_tokens, computed[place].worker_id, answer.worker_id), num_bytes):
            seen.brought_s.append(answer.ttft_s)
            seen.computed_s.append(computed[-1].ttft_s)
        else:
            seen.num_unproven += 1
    return seen


async def _ask(client: AsyncClient, prompt: list[int]) -> Answer:
    began = time.perf_counter()
    ttft_s = 0.0
    async with aclosing(client.stream(tokens=prompt, sampling=_SAMPLING)) as events:
        async for event in events:
            if isinstance(event, Chunk) and event.token_ids and not ttft_s:
                ttft_s = time.perf_counter() - began
            if isinstance(event, Complete):
                return Answer(ttft_s, event.usage.cached_tokens, event.report.prefill_worker_id)
    raise RuntimeError("the stream ended without its last event")


def _tokens(draw: random.Random, count: int) -> list[int]:
    return draw.choices(_VOCABULARY, k=count)


def _forget_files(directory: Path) -> None:
    """Has the system write out what the tiers wrote and forget it: what is read next comes from the disk."""
    for path in directory.glob("*/*/blocks"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
