"""`pdmesh up MODEL`: a whole cluster on this machine, until Ctrl-C."""

import asyncio
import contextlib
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pdmesh import __version__
from pdmesh.cli import words
from pdmesh.cli.loading import loading_display
from pdmesh.cli.terminal import make_console, plain_table
from pdmesh.config import parse
from pdmesh.local.cluster import LocalCluster, WorkerProcess
from pdmesh.local.config import LocalConfig
from pdmesh.types import Role

T = TypeVar("T")

_DESCRIPTION = (
    "Runs a router, prefill and decode workers, stores of KV where wanted and, unless a Redis is named, an embedded "
    "Valkey. Ctrl-C ends them all. Settings of the services that are not listed here pass through as their PDMESH_* "
    "variables; `python -m decode --help` names them."
)


class StoppedError(Exception):
    """A person or the system asked us to end."""


def main(argv: Sequence[str]) -> int:
    config = parse(LocalConfig, argv, prog="pdmesh up", description=_DESCRIPTION)
    return asyncio.run(_up(config, make_console()))


async def _up(config: LocalConfig, console: Console) -> int:
    started_at = time.monotonic()
    signals = Signals()
    cluster = LocalCluster(config, warnings_on(console))
    served = False
    try:
        async with running(cluster, signals, console) as workers:
            served = True
            console.print(_screen(cluster, workers, time.monotonic() - started_at))
            await signals.interrupt(cluster.watch())
            console.print("All workers were drained: nothing is left to run.")
    except StoppedError:
        # Once it served, being stopped is how it ends.
        return 0 if served else 130
    return 0


def warnings_on(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(Text(line, "yellow"), soft_wrap=True)


class Signals:
    """SIGINT, SIGTERM and SIGHUP, in the order in which they come. Made inside the event loop."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[signal.Signals] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._queue.put_nowait, number)

    async def interrupt(self, work: Awaitable[T]) -> T:
        """Waits for `work`; a signal cancels it and raises StoppedError."""
        working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(self._queue.get())
        try:
            await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise StoppedError
        finally:
            working.cancel()
            waiting.cancel()
            await asyncio.gather(working, waiting, return_exceptions=True)


@contextlib.asynccontextmanager
async def running(cluster: LocalCluster, signals: Signals, console: Console) -> AsyncIterator[list[WorkerProcess]]:
    """Starts the cluster before the block, showing progress, and ends it after; a signal then ends it at once."""
    try:
        with loading_display(console) as show:
            workers = await signals.interrupt(cluster.start(show))
        yield workers
    except StoppedError:
        console.print("\n[dim]Stopping: running requests may finish. Ctrl-C again stops at once.[/dim]")
        raise
    finally:
        with contextlib.suppress(StoppedError):
            await signals.interrupt(cluster.stop())


def _screen(cluster: LocalCluster, workers: list[WorkerProcess], seconds: float) -> Group:
    head = Text.assemble(("pdmesh ", "bold"), __version__, (f"  ready in {seconds:.1f} s", "green"))
    return Group(
        Text(), head, Text(), Padding(_processes(cluster, workers), (0, 0, 1, 2), expand=False), _hints(cluster), Text()
    )


def _processes(cluster: LocalCluster, workers: list[WorkerProcess]) -> Table:
    table = plain_table("worker", "role", "pid", "address", "model", "dtype", "KV blocks", "threads", "KV kept")
    for worker in workers:
        info = worker.info
        assert info is not None, "a cluster that has started knows its workers"
        table.add_row(
            worker.worker_id,
            words.role(info),
            str(worker.pid),
            info.address,
            info.model.name if info.model else "",
            words.precision(info.facts) if info.facts else "",
            f"{info.load.num_blocks} × {info.facts.block_size} tokens" if info.facts else "",
            "" if info.role is Role.STORE else _threads(cluster.config, info.tp_size * info.pp_size),
            _kept(cluster.config, info.role),
        )
    addresses = {"router": cluster.address, "valkey": cluster.redis_url}
    for child in cluster.children:
        if child.name in addresses:
            table.add_row(child.name, child.name, str(child.pid), addresses[child.name])
    return table


def _threads(config: LocalConfig, num_ranks: int) -> str:
    return f"{num_ranks} × {config.threads_per_rank}" if num_ranks > 1 else str(config.threads_per_rank)


def _kept(config: LocalConfig, role: Role) -> str:
    """How much KV a worker keeps beside its cache, or a store."""
    is_store = role is Role.STORE
    host_gib = config.store_host_gib if is_store else config.kv_host_gib
    disk_gib = config.store_disk_gib if is_store else config.kv_disk_gib
    sizes = ((host_gib, "memory"), (disk_gib, "disk"))
    return ", ".join(f"{size:g} GiB {where}" for size, where in sizes if size)


def _own_command() -> str:
    """How a person in this directory runs `pdmesh`."""
    if shutil.which("pdmesh"):
        return "pdmesh"
    return sys.argv[0] if Path(sys.argv[0]).name == "pdmesh" else f"{sys.executable} -m pdmesh.cli.main"


def _hints(cluster: LocalCluster) -> Table:
    command = _own_command()
    flag = "" if cluster.address == "127.0.0.1:50051" else f" --address {cluster.address}"
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("  [dim]try[/dim]", f'{command} generate "The capital of France is"{flag}')
    table.add_row("", f"{command} chat{flag}")
    table.add_row("  [dim]logs[/dim]", str(cluster.run_dir))
    table.add_row("  [dim]stop[/dim]", "Ctrl-C")
    return table
