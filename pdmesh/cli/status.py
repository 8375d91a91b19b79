"""`pdmesh status`: the workers of a cluster, as its router sees them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pdmesh.cli.connection import ConnectionConfig
from pdmesh.cli.screens import show
from pdmesh.cli.terminal import make_console, plain_table
from pdmesh.client import Client
from pdmesh.cluster_view import ServerInfo, WorkerView
from pdmesh.config import option, parse
from pdmesh.types import Load, Role, WorkerInfo, WorkerState


@dataclass(frozen=True, slots=True)
class StatusConfig:
    connection: ConnectionConfig
    watch: bool = option("show it anew every second, until Ctrl-C", default=False)
    json: bool = option("print JSON", default=False)


@dataclass(frozen=True, slots=True)
class _Status:
    router: ServerInfo
    workers: Sequence[WorkerView]


def main(argv: Sequence[str]) -> int:
    config = parse(StatusConfig, argv, prog="pdmesh status", description="Shows the workers of a cluster.")
    with Client(config.connection.address) as client:
        show(
            lambda: _Status(client.server_info(), client.workers()),
            functools.partial(_screen, client.address),
            make_console(),
            json=config.json,
            watch=config.watch,
        )
    return 0


def _screen(address: str, status: _Status) -> Group:
    server = status.router
    head = Text.assemble(
        ("router ", "dim"), address, ("  up ", "dim"), _duration(server.uptime_s), ("  requests ", "dim"),
        f"{server.num_active_requests} of {server.max_active_requests}", ("  version ", "dim"), server.version,
    )  # fmt: skip
    return Group(head, Text(), _table(status.workers) if status.workers else Text("no workers yet"))


def _table(workers: Sequence[WorkerView]) -> Table:
    load_columns = ("running", "waiting", "free blocks", "KV kept")
    table = plain_table("worker", "role", "state", "address", "model", *load_columns, "KV over", "seen", "")
    for view in sorted(workers, key=lambda view: (view.info.role.value, view.info.worker_id)):
        info, load = view.info, view.info.load
        is_store = info.role is Role.STORE
        lacking = "no KV from it" if is_store else "no requests"
        table.add_row(
            info.worker_id,
            _role(info),
            _state(view),
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


def _role(info: WorkerInfo) -> str:
    """The role, and the degrees of a worker with several ranks."""
    degrees = (("TP", info.tp_size), ("PP", info.pp_size))
    return " ".join((info.role.value, *(f"{name} {size}" for name, size in degrees if size > 1)))


def _kept(load: Load) -> str:
    places = ((load.num_host_blocks, "in memory"), (load.num_disk_blocks, "on disk"))
    return ", ".join(f"{num_blocks} {where}" for num_blocks, where in places if num_blocks)


def _state(view: WorkerView) -> Text:
    info = view.info
    match info.state:
        case WorkerState.READY:
            return Text("ready", "yellow" if view.excluded_because else "green")
        case WorkerState.LOADING if info.total_bytes:
            return Text(f"loading {100 * info.loaded_bytes // info.total_bytes} %", "cyan")
        case state:
            return Text(state.value, "cyan")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
