"""KV that left a worker's cache, brought back or computed again: `python -m bench.tiers [--json FILE]`.

Asks real clusters, one after the other, for a prefix of 1,024 tokens with a new question after it: the prefix was
evicted from every cache and lies in host memory, on disk, or in a store that a second worker shares. New prompts take
turns with these, and each ratio is to them. A time counts only where the processes' metrics prove whence the KV came.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from bench.machine import machine
from bench.tiers.figures import figures
from bench.tiers.rounds import measure
from bench.tiers.ways import PREFIX_TOKENS, WAYS
from pdmesh.cli.model_download import smollm2


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tiers", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--only", choices=tuple(WAYS), nargs="+", default=list(WAYS), help="default: all")
    parser.add_argument("--rounds", type=int, default=10, help="of each way; the median counts (default: 10)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--disk-dir", help="directory for KV on disk; default: a new one among the temporary files")
    options = parser.parse_args()
    console = Console()
    ways = asyncio.run(_measure(options, console))
    console.print(table(ways, options.dtype))
    if options.json:
        report = {"machine": machine(), "settings": vars(options), "ways": ways}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"written to {options.json}")


async def _measure(options: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    model = str(smollm2())
    ways = {}
    for name in options.only:
        way = WAYS[name]
        with (
            tempfile.TemporaryDirectory(prefix="pdmesh-kv-", dir=options.disk_dir) as directory,
            console.status(f"{way.title}: starting") as status,
        ):
            report = _progress(status, way.title)
            seen = await measure(way, model, options.dtype, options.rounds, Path(directory), report)
        ways[name] = figures(seen, way.wanted)
    return ways


def _progress(status: Status, title: str) -> Callable[[str], None]:
    return lambda line: status.update(f"{title}: {line}")


def table(ways: dict[str, dict[str, Any]], dtype: str) -> Table:
    facts = machine()
    title = (
        f"TTFT of a {PREFIX_TOKENS}-token prefix and a new question, {dtype}, 1 thread each; {facts['cores']} cores "
        f"{facts['processor']}"
    )
    result = Table(title=title, title_justify="left")
    result.add_column("KV brought from")
    for column in ("ms, p50 (p90)", "computed", "ratio", "wanted", "proven"):
        result.add_column(column, justify="right")
    for name, way in ways.items():
        result.add_row(
            WAYS[name].title,
            _times(way["brought_ms"]),
            _times(way["computed_ms"]),
            f"[{'green' if way['met'] else 'red'}]{way['ratio']:.2f}[/]",
            f"≤ {way['wanted']:g}",
            f"{way['brought_ms']['num']} of {way['brought_ms']['num'] + way['num_unproven']}",
        )
    return result


def _times(times: dict[str, float]) -> str:
    return f"{times['p50']:.0f} ({times['p90']:.0f})"


if __name__ == "__main__":
    main()
