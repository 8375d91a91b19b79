"""Size, speed and perplexity of one model by precision: `python -m bench.precision [--json FILE]`.

Perplexity is of 20 kB of English, beside transformers' in float32; speed that of one request that decodes, the
precisions taking turns. Of a Llama with a tokenizer, which is the demo's model unless another is named.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.engine.checkpoints import bench_cache, prepare
from bench.engine.decoding import start_decoding
from bench.machine import machine
from bench.precision.perplexity import TEXT, WINDOW, perplexity, transformers_perplexity
from bench.precision.reordered import write_reordered
from engine.assembly import Assembly, assemble
from engine.config import EngineConfig
from engine.loader import DTYPES, load_model, weights_size
from engine.models import build_model
from engine.weights.quantized import FORMATS
from engine.weights.source import open_checkpoint
from pdmesh.cli.model_download import smollm2
from pdmesh.errors import ConfigError
from router.text.tokenizer import load_text_model

# What activations and KV are in, and weights where they are not.
PRECISIONS = (
    ("float32", "none"),
    ("bfloat16", "none"),
    ("bfloat16", "int8"),
    ("bfloat16", "int4"),
    ("float32", "int8"),
    ("float32", "int4"),
)
_BASE = PRECISIONS[1]
_PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one precision.

    Attributes:
        perplexity_change: From float32's, as a share of it.
        step_ms: Of the fastest of several turns.
        speed_ratio: To bfloat16's tokens/s.
    """

    dtype: str
    quantization: str
    weight_bytes: int
    perplexity: float
    perplexity_change: float
    step_ms: float
    tokens_per_s: float
    speed_ratio: float


def measure(model: str, token_ids: list[int], *, threads: int, rounds: int, steps: int) -> list[Figures]:
    assemblies: dict[tuple[str, str], Assembly] = {}
    perplexities: dict[tuple[str, str], float] = {}
    torch.set_num_threads(threads)
    for precision in PRECISIONS:
        dtype, quantization = precision
        config = EngineConfig(
            model=model,
            dtype=dtype,
            quantization=quantization,
            device="cpu",
            num_threads=threads,
            max_model_len=max(WINDOW + 1, _PROMPT_TOKENS + 2 * rounds * steps + 2),
            kv_cache_bytes=256 << 20,
        )
        assemblies[precision] = assemble(config, load_model, lambda done, total: None)
        perplexities[precision] = perplexity(assemblies[precision].core, token_ids)
        start_decoding(assemblies[precision], num_running=1, prompt_tokens=_PROMPT_TOKENS)
    times: dict[tuple[str, str], list[float]] = {precision: [] for precision in PRECISIONS}
    for _ in range(rounds):
        for precision, assembly in assemblies.items():
            began = time.perf_counter()
            for _ in range(steps):
                assembly.core.step()
            times[precision].append((time.perf_counter() - began) / steps)
    best = {precision: min(of_precision) for precision, of_precision in times.items()}
    config_of_model = open_checkpoint(model).config
    return [
        Figures(
            dtype=dtype,
            quantization=quantization,
            weight_bytes=weights_size(build_model(config_of_model), DTYPES[dtype], FORMATS.get(quantization)),
            perplexity=perplexities[dtype, quantization],
            perplexity_change=perplexities[dtype, quantization] / perplexities[PRECISIONS[0]] - 1,
            step_ms=1e3 * best[dtype, quantization],
            tokens_per_s=1 / best[dtype, quantization],
            speed_ratio=best[_BASE] / best[dtype, quantization],
        )
        for dtype, quantization in PRECISIONS
    ]


def _reordered(directory: Path) -> Path:
    to = bench_cache() / f"{directory.name}-reordered"
    if not (to / "config.json").exists():
        write_reordered(directory, open_checkpoint(str(directory)).config, to)
    return to


def _table(figures: list[Figures], reference: float) -> Table:
    table = Table(title=f"perplexity by transformers in float32: {reference:.4f}", title_justify="left")
    for column in ("computed in", "weights", "size", "perplexity", "to float32", "tokens/s", "to bfloat16"):
        table.add_column(column, justify="right")
    for of in figures:
        table.add_row(
            of.dtype,
            of.dtype if of.quantization == "none" else of.quantization,
            f"{of.weight_bytes / 1e6:.0f} MB",
            f"{of.perplexity:.4f}",
            f"{of.perplexity_change:+.2%}",
            f"{of.tokens_per_s:.0f}",
            f"{of.speed_ratio:.2f}",
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.precision", description="size, speed and perplexity of one model by precision"
    )
    parser.add_argument("--model", help="model directory, .gguf file or Hub id; default: the demo's")
    parser.add_argument(
        "--reordered", action="store_true", help="with columns in another order: the same function, in other groups"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    try:
        model = options.model or str(smollm2())
        token_ids = load_text_model(model).encode(TEXT.read_text())
        directory = prepare(model, "float32", with_gguf=False).directory
        if options.reordered:
            directory = _reordered(directory)
            model = str(directory)
        figures = measure(model, token_ids, threads=options.threads, rounds=options.rounds, steps=options.steps)
        reference = transformers_perplexity(directory, token_ids, options.threads)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    Console().print(_table(figures, reference))
    if options.json:
        report = {
            "machine": machine(),
            "model": Path(model).name,
            "num_tokens": len(token_ids),
            "transformers_perplexity": reference,
            "precisions": [asdict(of_precision) for of_precision in figures],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
