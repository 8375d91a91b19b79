"""Prefill and decode of every engine, interleaved: in each round and at each point each engine has a turn.

What the machine can do drifts with its neighbours and its temperature, so only figures that were taken side by side
compare. All engines are loaded at once; those that do not have the turn wait and must use no processor.
"""

import itertools
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from bench.engine.checkpoints import Checkpoints, bench_cache
from bench.engine.installed import Installed
from bench.engine.interference import Interference, between, processor_times
from bench.engine.limits import LimitProbe, best
from bench.engine.peers.adapter import LoadRequest
from bench.engine.points import OURS, Point, compare
from bench.engine.processes import EngineProcess
from bench.engine.roofline import Limits
from engine.loader import DTYPES
from pdmesh.errors import ConfigError

# Between turns: threads of the last engine may spin for some 0.2 s before they sleep.
_PAUSE_S = 0.3
# Used by all waiting engines together, and by processes that are not the bench's.
_MAX_WAITING_CORES = 0.05
_MAX_FOREIGN_CORES = 0.1
# Below this, an engine computes another model, not the same one with other rounding.
_MIN_SAME_TOKENS = 0.8


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for every engine."""

    dtype: str
    device: str
    threads: int
    rounds: int
    points: tuple[Point, ...]


@dataclass(slots=True)
class Records:
    """What was seen: figures by point and engine, and limits by point, one of each for each round."""

    figures: dict[Point, dict[str, list[float]]]
    limits: dict[Point, list[Limits]]
    first_tokens: dict[str, list[int]]
    interference: list[Interference] = field(default_factory=list)


def measure(
    settings: Settings, checkpoints: Checkpoints, engines: Sequence[Installed], probe: LimitProbe, console: Console
) -> dict[str, Any]:
    """Starts the engines, runs all rounds and returns the report. Peers that cannot start are left out, with a line.

    Raises ConfigError where our engine cannot start, or one fails later.
    """
    with ExitStack() as stack:
        running = []
        for installed in engines:
            process = stack.enter_context(EngineProcess(installed, bench_cache() / "logs" / f"{installed.name}.log"))
            with console.status(f"loading {installed.name}"):
                try:
                    process.load(_load_request(settings, checkpoints, installed))
                except ConfigError as error:
                    if installed.name == OURS:
                        raise
                    console.print(f"{error.message}; it is left out", style="yellow")
                    process.close()
                    continue
            running.append(process)
        records = _run_rounds(settings, running, probe, console)
        report = _report(settings, checkpoints, records)
        report["engines"] = {
            process.name: {"version": process.version, "ready_s": process.ready_s} for process in running
        }
    _warn(report, console)
    return report


def _load_request(settings: Settings, checkpoints: Checkpoints, installed: Installed) -> LoadRequest:
    return LoadRequest(
        model=str(checkpoints.gguf_file if installed.takes_gguf else checkpoints.directory),
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        vocab_size=checkpoints.config.vocab_size,
        max_len=max(point.max_len for point in settings.points),
        max_seqs=max(point.num_sequences for point in settings.points),
    )


def _run_rounds(settings: Settings, engines: Sequence[EngineProcess], probe: LimitProbe, console: Console) -> Records:
    records = Records(
        figures={point: {engine.name: [] for engine in engines} for point in settings.points},
        limits={point: [] for point in settings.points},
        first_tokens={engine.name: [] for engine in engines},
    )
    seeds = itertools.count()
    # Round 0 warms up and is not counted.
    for number, point in itertools.product(range(settings.rounds + 1), settings.points):
        seed = next(seeds)
        limits = probe.sample()
        if number:
            records.limits[point].append(limits)
        # Another engine is first each time: none always follows the same neighbour.
        first = seed % len(engines)
        for engine in (*engines[first:], *engines[:first]):
            with console.status(f"round {number} of {settings.rounds}, {point.name}: {engine.name}"):
                time.sleep(_PAUSE_S)
                waiting = [other for other in engines if other is not engine]
                before = processor_times(engine, waiting)
                measured = engine.measure(point.request(seed))
                interference = between(before, processor_times(engine, waiting))
            if number:
                records.figures[point][engine.name].append(measured.tokens_per_s)
                records.first_tokens[engine.name] += measured.first_tokens
                records.interference.append(interference)
    return records


def _report(settings: Settings, checkpoints: Checkpoints, records: Records) -> dict[str, Any]:
    bytes_per_value = DTYPES[settings.dtype].itemsize
    all_limits = list(itertools.chain.from_iterable(records.limits.values()))
    ours = records.first_tokens[OURS]
    return {
        "limits": {
            "best": asdict(best(all_limits)),
            "median": {
                name: statistics.median(asdict(sample)[name] for sample in all_limits)
                for name in ("bandwidth_bytes_per_s", "gemm_flops_per_s")
            },
        },
        "points": {
            point.name: compare(
                records.figures[point], point.work(checkpoints.config, bytes_per_value), best(records.limits[point])
            )
            for point in settings.points
        },
        "same_first_token": {
            name: share_equal(ours, tokens) for name, tokens in records.first_tokens.items() if name != OURS
        },
        "interference": {
            name: statistics.mean(getattr(seen, name) for seen in records.interference)
            for name in ("waiting_cores", "foreign_cores")
        },
    }


def share_equal(left: Sequence[int], right: Sequence[int]) -> float:
    """Of two lists as long as each other."""
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(left)


def _warn(report: dict[str, Any], console: Console) -> None:
    waiting, foreign = report["interference"]["waiting_cores"], report["interference"]["foreign_cores"]
    if waiting > _MAX_WAITING_CORES:
        console.print(f"engines that wait used {waiting:.2f} cores: the figures are too low", style="yellow")
    if foreign > _MAX_FOREIGN_CORES:
        console.print(f"other processes used {foreign:.2f} cores: measure again on a quiet machine", style="yellow")
    for name, share in report["same_first_token"].items():
        if share < _MIN_SAME_TOKENS:
            console.print(f"only {share:.0%} of {name}'s first tokens are ours: is it the same model?", style="yellow")
