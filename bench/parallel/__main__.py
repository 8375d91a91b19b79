"""What a model gains by being spread over ranks: `python -m bench.parallel [--json FILE]`.

Parts, each selectable with --only:
    decode    tokens/s of a random Llama by tensor-parallel degree, beside ranks that never talk
    memory    what each rank has in memory
    sums      all-reduce over shared memory beside Gloo's
    pipeline  one prompt over two stages, beside the ideal
Every rank computes with one thread. Models are drawn at random, and kept.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import machine
from bench.parallel import decode, footprint, pipeline, sums
from bench.parallel.figures import (
    MAX_MEMORY_SHARE,
    MAX_PIPELINE_RATIO,
    MAX_SUM_RATIO,
    MIN_SPEEDUP,
    Figures,
    decode_figures,
    decode_misses,
    memory_figures,
    memory_misses,
    pipeline_figures,
    pipeline_misses,
    sum_figures,
    sum_misses,
)
from bench.parallel.models import LLAMA_1B, LLAMA_135M
from bench.parallel.others import MAX_CORES, other_cores, processor_times
from bench.parallel.tables import Rows, decode_table, memory_table, pipeline_table, sum_table
from engine.cpu.build import BuildError
from pdmesh.errors import ConfigError

# Models, and the degrees at which they are measured where there are as many cores.
_DECODES = ((LLAMA_1B, 2), (LLAMA_135M, 3))
_BATCHES = (1, 8)
_DEGREES = (1, 2)
_PROMPTS = (512, 2048)
_TARGETS = {
    "speedup": MIN_SPEEDUP,
    "memory_share": MAX_MEMORY_SHARE,
    "sum_ratio": MAX_SUM_RATIO,
    "pipeline_ratio": MAX_PIPELINE_RATIO,
}


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: must be at least 1")
    if _num_cores() < 2:
        parser.error("two cores are needed, one for each rank, and a Linux that tells what processes have")
    # Wide enough for the tables where they go to a file.
    console = Console(width=None if sys.stdout.isatty() else 120)
    report: dict[str, Any] = {"machine": machine(), "settings": vars(options), "targets": _TARGETS}
    try:
        for part in options.only:
            before = processor_times()
            with console.status("starting") as status:
                rows, raw, misses = _PARTS[part](options, status.update)
            console.print(_TABLES[part](rows))
            for miss in misses:
                console.print(miss, style="yellow")
            if (cores := other_cores(before, processor_times())) > MAX_CORES:
                console.print(f"others used {cores:.2f} cores: measure again on a quiet machine", style="yellow")
            report[part] = {"figures": dict(rows), "rounds": raw, "other_cores": cores}
    except (ConfigError, BuildError) as error:
        sys.exit(str(error))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"written to {options.json}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", choices=tuple(_PARTS), default=list(_PARTS), help="default: all parts"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each way; the median counts (default: 7)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="default: bfloat16")
    return parser


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


# A part's rows, all that was measured, and the targets that were missed.
Measured = tuple[Rows, dict[str, Any], list[str]]


def _decode(options: argparse.Namespace, say: Callable[[str], None]) -> Measured:
    rows: list[tuple[str, Figures]] = []
    raw: dict[str, Any] = {}
    misses: list[str] = []
    for model, tp in _DECODES:
        if tp > _num_cores():
            continue
        turns = decode.measure(model, tp, options.dtype, batches=_BATCHES, rounds=options.rounds, say=say)
        figures = decode_figures(turns)
        rows += [(f"{model.name}, TP {tp}, {batch} requests", found) for batch, found in figures.items()]
        raw |= {f"{model.name}, TP {tp}, {batch} requests": asdict(turn) for batch, turn in turns.items()}
        misses += decode_misses(tp, figures)
    return rows, raw, misses


def _memory(options: argparse.Namespace, say: Callable[[str], None]) -> Measured:
    footprints = footprint.measure(LLAMA_1B, _DEGREES, options.dtype, say)
    figures = memory_figures(footprints)
    raw = {f"TP {tp}": asdict(found) for tp, found in footprints.items()}
    return [(f"TP {tp}", found) for tp, found in figures.items()], raw, memory_misses(figures)


def _sums(options: argparse.Namespace, say: Callable[[str], None]) -> Measured:
    times = sums.measure(options.rounds, say)
    figures = sum_figures(times)
    return [(f"{size * 4 >> 10} KiB", found) for size, found in figures.items()], dict(times), sum_misses(figures)


def _pipeline(options: argparse.Namespace, say: Callable[[str], None]) -> Measured:
    times = pipeline.measure(LLAMA_135M, options.dtype, prompts=_PROMPTS, rounds=options.rounds, say=say)
    rows: list[tuple[str, Figures]] = []
    raw: dict[str, Any] = {}
    misses: list[str] = []
    for prompt, by_parts in times.items():
        figures = pipeline_figures(by_parts)
        rows += [(f"{prompt} tokens, {parts} micro-batches", found) for parts, found in figures.items()]
        raw |= {f"{prompt} tokens, {parts} micro-batches": asdict(found) for parts, found in by_parts.items()}
        misses += pipeline_misses(prompt, figures)
    return rows, raw, misses


_PARTS = {"decode": _decode, "memory": _memory, "sums": _sums, "pipeline": _pipeline}
_TABLES = {"decode": decode_table, "memory": memory_table, "sums": sum_table, "pipeline": pipeline_table}


if __name__ == "__main__":
    main()
