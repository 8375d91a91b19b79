"""What handing a prompt over costs: `python -m bench.handoff [MODEL] [--json FILE]`.

A prefill worker answers by itself (`Prefill.Run`, up to the first token, no KV leaves it) and, in turns, as part of a
mesh: client, router, decode worker, prefill worker, KV over the transport named. Prefill and decode worker are held to
one core each, and compute with one thread; no two prompts are alike.
"""

import argparse
import asyncio
import json
import os
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.handoff.figures import (
    MAX_SECOND_TOKEN_STEPS,
    MAX_TTFT_RATIO,
    MIN_OUTPUT_TOKENS,
    Round,
    misses,
    summarise,
)
from bench.handoff.measure import Setting, measure
from bench.machine import machine
from kvstore.transfer.transports import TRANSPORTS
from pdmesh.cli.model_download import smollm2
from pdmesh.config import fail
from pdmesh.errors import ConfigError


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        parser.error("two cores are needed, one for each worker, and a Linux that can hold a process to one")
    if options.output_tokens < MIN_OUTPUT_TOKENS:
        parser.error(f"--output-tokens is {options.output_tokens}: a decode step is told from {MIN_OUTPUT_TOKENS} on")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: must be at least 1")
    console = Console()
    try:
        setting = Setting(
            model=options.model or str(smollm2()),
            dtype=options.dtype,
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            rounds=options.rounds,
            kv_cache_bytes=options.kv_cache_mib << 20,
            prefill_core=cores[0],
            decode_core=cores[1],
        )
        rounds = asyncio.run(_measure(setting, options.transports, console))
    except ConfigError as error:
        fail(error.message)
    figures = {transport: summarise(measured) for transport, measured in rounds.items()}
    console.print(table(figures, setting))
    for transport, figure in figures.items():
        for miss in misses(figure):
            console.print(f"{transport}: {miss}", style="yellow")
    if options.json:
        Path(options.json).write_text(json.dumps(_report(setting, rounds, figures), indent=2) + "\n")
        console.print(f"written to {options.json}")


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m bench.handoff", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="model directory or .gguf file; default: SmolLM2-135M, downloaded")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS), help="default: all")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="default: 1024")
    parser.add_argument("--output-tokens", type=int, default=16, help="default: 16")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each way; the median counts (default: 20)")
    parser.add_argument(
        "--kv-cache-mib", type=int, default=96, help="of each worker; all of it is written before (default: 96)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    return parser


async def _measure(setting: Setting, transports: list[str], console: Console) -> dict[str, list[Round]]:
    with console.status("starting") as status:
        return {transport: await measure(setting, transport, status.update) for transport in transports}


def _report(
    setting: Setting, rounds: dict[str, list[Round]], figures: dict[str, dict[str, float]]
) -> dict[str, object]:
    return {
        "machine": machine(),
        "settings": {**asdict(setting), "model": Path(setting.model).name},
        "targets": {"ttft_ratio": MAX_TTFT_RATIO, "second_token_steps": MAX_SECOND_TOKEN_STEPS},
        "transports": figures,
        "rounds": {transport: [asdict(one) for one in measured] for transport, measured in rounds.items()},
    }


def table(figures: dict[str, dict[str, float]], setting: Setting) -> Table:
    """The figures of each transport, one column each."""
    title = (
        f"{setting.prompt_tokens} prompt tokens, {setting.dtype}, 1 thread and 1 core each worker; "
        f"medians of {setting.rounds} rounds, 90th percentile after a slash"
    )
    result = Table(title=title, title_justify="left")
    result.add_column("")
    for transport in figures:
        result.add_column(transport, justify="right")
    for label, cell in _ROWS.items():
        result.add_row(label, *(cell.format(**figure) for figure in figures.values()))
    return result


_ROWS = {
    "TTFT by itself, ms": "{alone_ttft_ms:.1f} / {alone_ttft_p90_ms:.1f}",
    "TTFT of the mesh, ms": "{mesh_ttft_ms:.1f} / {mesh_ttft_p90_ms:.1f}",
    f"ratio (at most {MAX_TTFT_RATIO})": "{ttft_ratio:.3f} / {ttft_ratio_p90:.3f}",
    "a decode step, ms": "{decode_step_ms:.1f}",
    "to the second token, ms": "{second_token_ms:.1f}",
    f"  in steps (at most {MAX_SECOND_TOKEN_STEPS:g})": "{second_token_steps:.2f} / {second_token_steps_p90:.2f}",
    "KV, MiB": "{kv_mib:.1f}",
    "transfer, ms": "{transfer_ms:.1f}",
    "computing meanwhile, ms": "{prefill_ms:.1f}",
}


if __name__ == "__main__":
    main()
