"""Our engine beside its peers and the machine's limits: `python -m bench.engine [MODEL] [--json FILE]`.

Parts, each selectable with --only:
    peers      prefill and decode of every engine, interleaved, and shares of what the machine can do
    mixed      requests that decode while long prompts arrive
    overhead   what of a decode step is not the model's work, and waiting for the interpreter
    operations where a step's time goes, by operation of the CPU kernels
    kv         attention and steps at long contexts, with K and V in the model's type and in 8 bits
    start      from the start of a process to the first token
On a GPU (--device cuda): peers and mixed, with a random Llama of 8 billion parameters unless a model is named.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.engine import gil, installed, kv_types, mixed, operations, overhead, start, throughput
from bench.engine.checkpoints import prepare
from bench.engine.limits import LimitProbe
from bench.engine.points import parse_point
from bench.engine.random_llama import LLAMA_8B, TINY, write_random_llama
from bench.engine.tables import columns_table, figures_table, operations_table, throughput_table
from bench.machine import machine
from engine.config import EngineConfig
from engine.loader import DTYPES
from pdmesh.cli.model_download import smollm2
from pdmesh.errors import ConfigError

_POINTS = {
    "cpu": ("prefill_128", "prefill_512", "prefill_1024", "decode_b1", "decode_b8", "decode_b32"),
    "cuda": ("prefill_2048", "decode_b1", "decode_b32"),
}
_PARTS = {"cpu": ("peers", "mixed", "overhead", "operations", "kv", "start"), "cuda": ("peers", "mixed")}
_PEERS = {"cpu": installed.PEERS, "cuda": ("transformers",)}
_KV_POINTS = tuple(kv_types.Point(count, context) for context in (2000, 8000) for count in (1, 8))
_PROFILED_PROMPTS, _PROFILED_DECODES = (128, 512, 1024), (1, 8, 32)
# Where files are memory: 16 GB need not be written to a disk.
_TMPFS = Path("/dev/shm")


def main() -> None:
    options = _parser().parse_args()
    # Wide enough for the tables where they go to a file.
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        with ExitStack() as stack:
            report = _Bench(options, console, stack).run()
    except ConfigError as error:
        sys.exit(error.message)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"written to {options.json}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="model directory or .gguf file; default: SmolLM2-135M, downloaded")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=_PARTS["cpu"], help="default: all parts")
    parser.add_argument("--points", nargs="+", metavar="POINT", help=f"default: {' '.join(_POINTS['cpu'])}")
    parser.add_argument("--peers", nargs="*", metavar="PEER", help="default: those that are installed")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine; the median counts (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of each engine, on a CPU (default: 2)")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES), help="default: bfloat16")
    parser.add_argument("--device", default="cpu", choices=tuple(_PARTS), help="default: cpu")
    return parser


class _Bench:
    """The parts that were asked for, each of which prints its table and adds to the report."""

    def __init__(self, options: argparse.Namespace, console: Console, stack: ExitStack) -> None:
        self._options = options
        self._console = console
        self._stack = stack
        self._parts = options.only or _PARTS[options.device]
        if wrong := set(self._parts) - set(_PARTS[options.device]):
            raise ConfigError(f"{', '.join(sorted(wrong))}: measured on CPUs only")
        self._model = options.model or self._default_model()

    def run(self) -> dict[str, Any]:
        settings = {**vars(self._options), "model": Path(self._model).name, "only": list(self._parts)}
        report: dict[str, Any] = {"machine": machine(), "settings": settings}
        if "peers" in self._parts:
            report |= self._peers()
        if "mixed" in self._parts:
            report["mixed"] = self._mixed()
        if "overhead" in self._parts:
            report["overhead"] = self._overhead()
        if "operations" in self._parts:
            report["operations"] = self._operations()
        if "kv" in self._parts:
            report["kv"] = self._kv()
        if "start" in self._parts:
            report["start"] = self._start()
        return report

    def _default_model(self) -> str:
        if self._options.device == "cpu":
            return str(smollm2())
        with self._console.status("drawing the weights of a random model"):
            directory = self._scratch()
            return str(write_random_llama(LLAMA_8B, self._options.dtype, directory, torch.device("cuda")))

    def _scratch(self) -> Path:
        parent = _TMPFS if _TMPFS.is_dir() else None
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pdmesh-bench-", dir=parent)))

    def _peers(self) -> dict[str, Any]:
        options = self._options
        peers = self._find_peers()
        checkpoints = prepare(self._model, options.dtype, with_gguf=any(peer.takes_gguf for peer in peers))
        settings = throughput.Settings(
            dtype=options.dtype,
            device=options.device,
            threads=options.threads,
            rounds=options.rounds,
            points=tuple(parse_point(name) for name in options.points or _POINTS[options.device]),
        )
        probe = LimitProbe(torch.device(options.device), DTYPES[options.dtype], options.threads)
        engines = [installed.ours(options.threads), *peers]
        report = throughput.measure(settings, checkpoints, engines, probe, self._console)
        self._console.print(throughput_table(report))
        return report

    def _find_peers(self) -> list[installed.Installed]:
        options = self._options
        peers = []
        for name in _PEERS[options.device] if options.peers is None else options.peers:
            try:
                peers.append(installed.find_peer(name, device=options.device, threads=options.threads))
            except ConfigError as error:
                self._console.print(error.message, style="yellow")
        return peers

    def _mixed(self) -> dict[str, float]:
        with self._console.status(f"{mixed.NUM_STREAMS} streams, and a prompt of {mixed.PROMPT} tokens each second"):
            figures = asyncio.run(mixed.measure(self._config(self._model)))
        title = f"{mixed.NUM_STREAMS} requests decode, a prompt of {mixed.PROMPT} tokens arrives each second"
        self._console.print(figures_table(title, figures))
        return figures

    def _overhead(self) -> dict[str, dict[str, float]]:
        with self._console.status("timing the parts of a step"):
            tiny = str(write_random_llama(TINY, self._options.dtype, self._scratch(), torch.device("cpu")))
            report = {
                "b32": overhead.measure(self._config(self._model), num_running=32),
                "tiny_b256": overhead.measure(self._config(tiny, max_num_seqs=256), num_running=256),
                "event_loop": asyncio.run(gil.measure(self._config(self._model, spare=1), num_running=32)),
            }
        titles = {
            "b32": "a step of 32 decodes",
            "tiny_b256": "a step of 256 decodes of a tiny model",
            "event_loop": "a step of 32 decodes beside an event loop, one core left free",
        }
        for name, figures in report.items():
            self._console.print(figures_table(titles[name], figures))
        return report

    def _operations(self) -> dict[str, dict[str, float]]:
        with self._console.status("timing the operations of a step"):
            config = replace(self._config(self._model), max_num_batched_tokens=max(_PROFILED_PROMPTS))
            report = operations.measure(config, prompts=_PROFILED_PROMPTS, decodes=_PROFILED_DECODES)
        self._console.print(operations_table(report))
        return report

    def _kv(self) -> dict[str, dict[str, float]]:
        with self._console.status("attending to long contexts"):
            report = kv_types.measure(self._config(self._model), _KV_POINTS, self._options.rounds)
        self._console.print(columns_table("K and V in the model's type and in 8 bits; ms of one thread", report))
        return report

    def _start(self) -> dict[str, float]:
        options = self._options
        with self._console.status("starting"):
            figures = start.measure(self._model, dtype=options.dtype, threads=options.threads)
        self._console.print(figures_table(f"from process start to the first token: {Path(self._model).name}", figures))
        return figures

    def _config(self, model: str, *, max_num_seqs: int = 64, spare: int = 0) -> EngineConfig:
        """As the engine is used, with `spare` of its threads left to others."""
        options = self._options
        return EngineConfig(
            model=model,
            dtype=options.dtype,
            device=options.device,
            max_num_seqs=max_num_seqs,
            num_threads=max(1, options.threads - spare),
        )


if __name__ == "__main__":
    main()
