"""Loading beside transformers with Accelerate, and a model of which half waits on disk: `python -m bench.loading`.

A random Llama of 2 billion parameters in bfloat16, in 8 files, which are made once and kept. Each load is a process of
its own; ways take turns, and all find the files in the system's cache.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.engine.checkpoints import bench_cache
from bench.engine.random_llama import llama_config, write_random_llama
from bench.loading.bandwidth import measure_bandwidth
from bench.loading.figures import MAX_TIME_RATIO, MIN_OFFLOAD_RATIO, load_figures, offload_figures
from bench.machine import machine
from engine.config import DISK, EngineConfig
from engine.models import build_model
from engine.placement import place_weights
from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError

LLAMA_2B = llama_config(
    "random-llama-2b",
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=31,
    num_heads=32,
    num_kv_heads=8,
)
_NUM_FILES = 8
_CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a directory in bfloat16; default: the random Llama")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    cache = bench_cache()
    model = options.model or _random_llama(cache / "random-llama-2b")
    report = measure(model, cache, options.turns, options.threads)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    loading, offloading = report["loading"], report["offloading"]
    if loading["ratio"] > MAX_TIME_RATIO or offloading["ratio"] < MIN_OFFLOAD_RATIO or not report["same_tokens"]:
        sys.exit("a target was missed")


def measure(model: Path, offload_dir: Path, turns: int, threads: int) -> dict[str, Any]:
    """Figures of a model. The first turn fills the page cache, and does not count."""
    without_values = build_model(open_checkpoint(str(model)).config)
    weight_bytes = sum(parameter.numel() for parameter in without_values.parameters()) * torch.bfloat16.itemsize
    max_memory = f"cpu={weight_bytes // 2}"
    config = EngineConfig(model=str(model), device="cpu", max_memory=max_memory, offload_dir=str(offload_dir))
    placement = place_weights(without_values, config, _CPU, torch.bfloat16, None, output_waits=True)
    runs: dict[str, list[Any]] = {"ours": [], "transformers": [], "offloaded": []}
    for turn in range(turns + 1):
        # Neither always comes first.
        for way in ("ours", "transformers")[:: -1 if turn % 2 else 1]:
            runs[way].append(_run(way, model, threads))
    # Apart: what writes and deletes gigabytes slows what comes next.
    for _ in range(turns + 1):
        runs["offloaded"].append(_run("ours", model, threads, max_memory, str(offload_dir)))
    ours, theirs, offloaded = (of_way[1:] for of_way in runs.values())
    bandwidth = measure_bandwidth(offload_dir)
    return {
        "machine": machine(),
        "weight_bytes": weight_bytes,
        "loading": asdict(load_figures(ours, theirs, weight_bytes)),
        "bandwidth": asdict(bandwidth),
        "offloading": asdict(offload_figures(offloaded, ours, placement.waiting_bytes[DISK], bandwidth)),
        "same_tokens": all(run["tokens"] == ours[0]["tokens"] for run in offloaded),
        "runs": runs,
    }


def _random_llama(directory: Path) -> Path:
    if not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_random_llama(LLAMA_2B, "bfloat16", directory, _CPU, num_files=_NUM_FILES)
    return directory


def _run(way: str, model: Path, threads: int, *options: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "bench.loading.probe", way, str(model), str(threads), *options],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(f"{way} did not load: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
