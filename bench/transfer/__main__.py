"""Every KV transport beside memcpy, a bare socket and a bare gRPC stream: `python -m bench.transfer [--json FILE]`.

Two processes on this machine; all ways take turns. Processor time is that of both processes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from bench.machine import machine
from bench.transfer.measure import CPU_YARDSTICKS, YARDSTICKS, measure

# SmolLM2-135M in bfloat16: 16 tokens, 30 layers, K and V, 3 heads of 64.
_BLOCK_BYTES = 16 * 30 * 2 * 3 * 64 * 2
_BLOCK_TOKENS = 16
_SMALL = {"one_block": 1, "1024_tokens": 1024 // _BLOCK_TOKENS}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.transfer", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--mib", type=int, default=64, help="of KV in the large move (default: 64)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each way; the median counts (default: 15)")
    options = parser.parse_args()
    num_blocks = max(max(_SMALL.values()), (options.mib << 20) // _BLOCK_BYTES)
    console = Console()
    with console.status("starting") as status:
        figures = uvloop.run(
            measure(
                num_blocks=num_blocks,
                block_bytes=_BLOCK_BYTES,
                rounds=options.rounds,
                small=_SMALL,
                on_round=lambda number: status.update(f"round {number} of {options.rounds}"),
            )
        )
    settings = {"num_blocks": num_blocks, "block_bytes": _BLOCK_BYTES, "rounds": options.rounds}
    report = {
        "machine": machine(),
        "settings": settings,
        "ways": figures,
        "ratios": ratios(figures),
    }
    console.print(table(figures, settings))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"written to {options.json}")


def ratios(figures: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Of each transport: its rate to that of `to`, and its processor time per GiB to that of `cpu_to`."""
    return {
        name: {
            "to": yardstick,
            "cpu_to": CPU_YARDSTICKS[name],
            "gib_per_s": figures[name]["gib_per_s"] / figures[yardstick]["gib_per_s"],
            "cpu_s_per_gib": figures[name]["cpu_s_per_gib"] / figures[CPU_YARDSTICKS[name]]["cpu_s_per_gib"],
        }
        for name, yardstick in YARDSTICKS.items()
        if name in figures
    }


def table(figures: dict[str, dict[str, float]], settings: dict[str, int]) -> Table:
    num_mib = settings["num_blocks"] * settings["block_bytes"] / (1 << 20)
    result = Table(title=f"{num_mib:.0f} MiB of KV between two processes, medians", title_justify="left")
    result.add_column("way")
    for column in ("GiB/s", "ratio", "CPU s/GiB", "ratio", "1 block, ms", "1,024 tokens, ms"):
        result.add_column(column, justify="right")
    compared = ratios(figures)
    for name, way in figures.items():
        ratio = compared.get(name)
        result.add_row(
            name,
            f"{way['gib_per_s']:.2f}",
            f"{ratio['gib_per_s']:.2f}" if ratio else "",
            f"{way['cpu_s_per_gib']:.2f}",
            f"{ratio['cpu_s_per_gib']:.2f}" if ratio else "",
            f"{way['one_block_ms']:.2f}",
            f"{way['1024_tokens_ms']:.2f}",
        )
    result.caption_justify = "left"
    result.caption = "\n".join(_compared(name, ratio) for name, ratio in compared.items())
    return result


def _compared(name: str, ratio: dict[str, Any]) -> str:
    processor_time = "" if ratio["to"] == ratio["cpu_to"] else f", its processor time with that of {ratio['cpu_to']}"
    return f"{name} is compared with {ratio['to']}{processor_time}"


if __name__ == "__main__":
    main()
