"""`pdmesh status`: the workers of a cluster, as its router sees them, or what one of them says of itself."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pdmesh.cli import words
from pdmesh.cli.connection import ConnectionConfig
from pdmesh.cli.screens import show
from pdmesh.cli.terminal import make_console, plain_table
from pdmesh.client import Client
from pdmesh.cluster_view import RankStatus, ServerInfo, WorkerStatus, WorkerView
from pdmesh.config import option, parse
from pdmesh.types import Load, Role, WorkerInfo, WorkerState


@dataclass(frozen=True, slots=True)
class StatusConfig:
    connection: ConnectionConfig
    worker: str | None = option(
        "one worker's id: what it holds, and its ranks; default: all workers", default=None, positional=True
    )
    watch: bool = option("show it anew every second, until Ctrl-C", default=False)
    json: bool = option("print JSON", default=False)


@dataclass(frozen=True, slots=True)
class _Status:
    router: ServerInfo
    workers: Sequence[WorkerView]


def main(argv: Sequence[str]) -> int:
    config = parse(StatusConfig, argv, prog="pdmesh status", description="Shows the workers of a cluster.")
    worker_id = config.worker
    with Client(config.connection.address) as client:
        look = functools.partial(show, console=make_console(), json=config.json, watch=config.watch)
        if worker_id is not None:
            look(lambda: client.worker_status(worker_id), _worker)
        else:
            look(lambda: _Status(client.server_info(), client.workers()), functools.partial(_cluster, client.address))
    return 0


def _cluster(address: str, status: _Status) -> Group:
    server = status.router
    head = Text.assemble(
        ("router ", "dim"), address, ("  up ", "dim"), words.uptime(server.uptime_s), ("  requests ", "dim"),
        f"{server.num_active_requests} of {server.max_active_requests}", ("  version ", "dim"), server.version,
    )  # fmt: skip
    return Group(head, Text(), _table(status.workers) if status.workers else Text("no workers yet"))


def _worker(status: WorkerStatus) -> Group:
    info, load = status.info, status.info.load
    head = Text.assemble(
        ("worker ", "dim"), info.worker_id, "  ", words.role(info), "  ", _state(info), ("  at ", "dim"), info.address,
        ("  up ", "dim"), words.uptime(status.uptime_s),
        *((("  in ", "dim"), words.precision(info.facts)) if info.facts else ()),
    )  # fmt: skip
    held = Text.assemble(
        ("requests ", "dim"), str(status.num_requests), ("  steps ", "dim"), str(status.num_steps),
        ("  leases ", "dim"), str(status.num_leases), ("  tickets ", "dim"), str(status.num_tickets),
        ("  blocks ", "dim"), f"{load.num_free_blocks} of {load.num_blocks} free, "
        f"{status.num_cached_blocks} of these hold KV",
    )  # fmt: skip
    return Group(head, held, *((Text(), _ranks(status.ranks)) if status.ranks else ()))


def _ranks(ranks: Sequence[RankStatus]) -> Table:
    table = plain_table("rank", "host", "pid", "weights", "KV cache")
    for rank in ranks:
        table.add_row(
            str(rank.rank), rank.host, str(rank.pid), words.size(rank.weight_bytes), words.size(rank.kv_bytes)
        )
    return table


def _table(workers: Sequence[WorkerView]) -> Table:
    load_columns = ("running", "waiting", "free blocks", "KV kept")
    table = plain_table("worker", "role", "state", "address", "model", *load_columns, "KV over", "seen", "")
    for view in sorted(workers, key=lambda view: (view.info.role.value, view.info.worker_id)):
        info, load = view.info, view.info.load
        is_store = info.role is Role.STORE
        lacking = "no KV from it" if is_store else "no requests"
        table.add_row(
            info.worker_id,
            words.role(info),
            _state(info, "yellow" if view.excluded_because else "green"),
            info.address,
            info.model.name if info.model else "",
            "" if is_store else str(load.num_running),
            "" if is_store else str(load.num_waiting),
            f"{load.num_free_blocks} of {load.num_blocks}" if load.num_blocks else "",
            _kept(load),
            info.kv_transports.replace(",", ", "),
            f"{view.age_s:.1f} s ago",
            Text(f"{lacking}: {view.excluded_because}" if view.excluded_because else "", "yellow"),
        )
    return table


def _kept(load: Load) -> str:
    places = ((load.num_host_blocks, "in memory"), (load.num_disk_blocks, "on disk"))
    return ", ".join(f"{num_blocks} {where}" for num_blocks, where in places if num_blocks)


def _state(info: WorkerInfo, ready_style: str = "green") -> Text:
    match info.state:
        case WorkerState.READY:
            return Text("ready", ready_style)
        case WorkerState.LOADING if info.total_bytes:
            return Text(f"loading {100 * info.loaded_bytes // info.total_bytes} %", "cyan")
        case state:
            return Text(state.value, "cyan")
