"""`pdmesh batch in.jsonl out.jsonl`: runs a file of prompts, and goes on where an earlier run ended.

Exit codes: 0 if every request succeeded, 1 if some failed or the cluster was lost, 2 for a wrong call.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pdmesh.async_client import AsyncClient
from pdmesh.batch.input_file import InputFile
from pdmesh.batch.output_file import OutputFile
from pdmesh.batch.patience import Patience
from pdmesh.batch.progress import Progress, show
from pdmesh.batch.runner import Runner
from pdmesh.cli.connection import ConnectionConfig
from pdmesh.cli.terminal import make_console
from pdmesh.config import option, parse
from pdmesh.errors import ConfigError
from pdmesh.tasks import beside

_DESCRIPTION = (
    "Runs a file of prompts in OpenAI's batch format, and writes one result for each, in the same order. Killed at any "
    "moment and started again with the same arguments, it goes on after the results that are there."
)


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """Raises ConfigError for values that make no sense."""

    connection: ConnectionConfig
    input: str = option("requests, one JSON object a line: custom_id, method, url, body", positional=True)
    output: str = option("where the results go, one a line", positional=True)
    concurrency: int = option("requests in flight at once", default=32)
    wait_s: float = option("seconds to wait for a cluster of which nobody answers", default=600.0)

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(f"--concurrency is {self.concurrency}: must be at least 1")
        if not self.wait_s >= 0:
            raise ConfigError(f"--wait-s is {self.wait_s}: must not be negative")


def main(argv: Sequence[str]) -> int:
    config = parse(BatchConfig, argv, prog="pdmesh batch", description=_DESCRIPTION)
    console = make_console(stderr=True)
    with InputFile(Path(config.input)) as source, OutputFile(Path(config.output), source) as output:
        progress = Progress(output, source.num_requests)
        if output.num_finished:
            has = f"{config.output} has {output.num_finished:,} of {source.num_requests:,} results already"
            console.print(Text(has), soft_wrap=True)
        try:
            asyncio.run(_run(config, source, output, progress, console))
        except KeyboardInterrupt:
            console.print(f"stopped: {progress.num_finished:,} results are kept, the same command goes on after them")
            raise
        console.print(Text(progress.summary()), soft_wrap=True)
        return 1 if output.num_failed else 0


async def _run(
    config: BatchConfig, source: InputFile, output: OutputFile, progress: Progress, console: Console
) -> None:
    patience = Patience(config.wait_s, lambda line: console.print(Text(line, "yellow"), soft_wrap=True))
    async with AsyncClient(config.connection.address) as client:
        runner = Runner(source, output, client, config.concurrency, patience, progress)
        await beside(runner.run(), show(progress, console))
