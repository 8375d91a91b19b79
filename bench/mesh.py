"""The whole mesh beside the same engine called in process: `python -m bench.mesh [MODEL] [--json FILE]`.

The mesh is router, one prefill and one decode worker in processes of their own, reached over gRPC; the engine alone is
the one that a worker runs, with as many threads as one of them has, doing both jobs. Both serve the same load, in turns
within one run. The ratio is mesh / engine: what the mesh costs, and, for TTFT and tokens/s under load, what its second
process gives back.
"""

import argparse
import asyncio
import itertools
import json
import statistics
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.load import Generate, Workload, run
from bench.machine import machine
from engine.api import EngineRequest
from engine.config import EngineConfig
from engine.local_engine import LocalEngine
from pdmesh import AsyncClient
from pdmesh.cli.model_download import smollm2
from pdmesh.generation import Chunk
from pdmesh.local.cluster import LocalCluster
from pdmesh.local.config import LocalConfig
from pdmesh.sampling import SamplingParams

METRICS = {
    "ttft_p50_ms": "TTFT p50, ms",
    "itl_p50_ms": "inter-token p50, ms",
    "itl_p99_ms": "inter-token p99, ms",
    "tokens_per_s": "output tokens/s",
}
Figures = dict[str, float]


def main() -> None:
    options = _parser().parse_args()
    console = Console()
    report = asyncio.run(_measure(options, console))
    console.print(_table(report["points"], options))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"written to {options.json}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.mesh", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="model directory or .gguf file; default: SmolLM2-135M, downloaded")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="default: 1 8 32")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side; the median counts")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1, help="of each worker, and of the engine alone")
    return parser


async def _measure(options: argparse.Namespace, console: Console) -> dict[str, dict[str, object]]:
    model = options.model or str(smollm2())
    engine = LocalEngine(EngineConfig(model=model, dtype=options.dtype, num_threads=options.threads))
    config = LocalConfig(model=model, port=0, dtype=options.dtype, num_threads=options.threads)
    cluster = LocalCluster(config, lambda line: console.print(line, style="yellow"))
    try:
        with console.status("starting the mesh and the engine"):
            await engine.start(lambda done, total: None)
            await cluster.start(lambda workers: None)
        async with AsyncClient(cluster.address) as client:
            sides = {"engine": _engine(engine, options.output_tokens), "mesh": _mesh(client, options.output_tokens)}
            workload = Workload(options.prompt_tokens, options.output_tokens, engine.model.vocab_size)
            points = await _points(sides, workload, options, console)
    finally:
        await cluster.stop()
        await engine.close()
    return {"machine": machine(), "settings": {**vars(options), "model": Path(model).name}, "points": points}


async def _points(
    sides: dict[str, Generate], workload: Workload, options: argparse.Namespace, console: Console
) -> dict[str, object]:
    seeds = itertools.count()
    for generate in sides.values():
        await run(generate, workload, concurrency=2, requests=4, seed=next(seeds))
    points: dict[str, object] = {}
    for concurrency in options.concurrency:
        rounds: dict[str, list[Figures]] = {name: [] for name in sides}
        for number, (name, generate) in itertools.product(range(options.rounds), sides.items()):
            with console.status(f"concurrency {concurrency}, round {number + 1} of {options.rounds}: {name}"):
                requests = max(4, 2 * concurrency)
                seen = await run(generate, workload, concurrency=concurrency, requests=requests, seed=next(seeds))
            rounds[name].append(seen.figures())
        points[f"concurrency_{concurrency}"] = {metric: _compare(rounds, metric) for metric in METRICS}
    return points


def _compare(rounds: dict[str, list[Figures]], metric: str) -> Figures:
    medians = {name: statistics.median(figures[metric] for figures in side) for name, side in rounds.items()}
    return {**medians, "ratio": medians["mesh"] / medians["engine"]}


def _sampling(output_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)


def _engine(engine: LocalEngine, output_tokens: int) -> Generate:
    numbers = itertools.count()

    async def generate(prompt: list[int]) -> AsyncIterator[int]:
        request = EngineRequest(f"bench-{next(numbers)}", tuple(prompt), _sampling(output_tokens))
        async with aclosing(engine.generate(request)) as outputs:
            async for output in outputs:
                if output.token_ids:
                    yield len(output.token_ids)

    return generate


def _mesh(client: AsyncClient, output_tokens: int) -> Generate:
    async def generate(prompt: list[int]) -> AsyncIterator[int]:
        async with aclosing(client.stream(tokens=prompt, sampling=_sampling(output_tokens))) as events:
            async for event in events:
                if isinstance(event, Chunk) and event.token_ids:
                    yield len(event.token_ids)

    return generate


def _table(points: dict[str, object], options: argparse.Namespace) -> Table:
    facts = machine()
    title = (
        f"{options.prompt_tokens} prompt and {options.output_tokens} output tokens, {options.dtype}, "
        f"{options.threads} thread(s) each; {facts['cores']} cores {facts['processor']}"
    )
    table = Table(title=title, title_justify="left")
    for name in ("concurrency", "figure", "engine alone", "mesh", "mesh / engine"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for point, figures in points.items():
        assert isinstance(figures, dict)
        for number, (metric, label) in enumerate(METRICS.items()):
            values = figures[metric]
            concurrency = point.removeprefix("concurrency_") if number == 0 else ""
            cells = (f"{values['engine']:.1f}", f"{values['mesh']:.1f}", f"{values['ratio']:.2f}")
            table.add_row(concurrency, label, *cells, end_section=number == len(METRICS) - 1)
    return table


if __name__ == "__main__":
    main()
