"""`pdmesh transfers`: how KV moves between the workers of a cluster, and what went wrong on the way."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pdmesh.cli import words
from pdmesh.cli.connection import ConnectionConfig
from pdmesh.cli.screens import show
from pdmesh.cli.terminal import make_console, plain_table
from pdmesh.client import Client
from pdmesh.config import option, parse
from pdmesh.transfers import Outcome, TransferReport, WorkerTransfers

# Of each worker; --json has all that the workers keep.
_MAX_LIVE_SHOWN = 16
_MAX_FAILURES_SHOWN = 8

# What each worker that answered has said, by its id.
Reports = Sequence[tuple[str, TransferReport]]

_OUTCOME_STYLES = {Outcome.ABORTED: "dim", Outcome.CORRUPTED: "red", Outcome.REFUSED: "red"}


@dataclass(frozen=True, slots=True)
class TransfersConfig:
    connection: ConnectionConfig
    watch: bool = option("show it anew every second, until Ctrl-C", default=False)
    json: bool = option("print JSON", default=False)


@dataclass(frozen=True, slots=True)
class _Transfers:
    workers: Sequence[WorkerTransfers]


def main(argv: Sequence[str]) -> int:
    description = "Shows how KV moves between the workers of a cluster."
    config = parse(TransfersConfig, argv, prog="pdmesh transfers", description=description)
    with Client(config.connection.address) as client:
        show(lambda: _Transfers(client.transfers()), _screen, make_console(), json=config.json, watch=config.watch)
    return 0


def _screen(transfers: _Transfers) -> Group:
    if not transfers.workers:
        return Group(Text("no workers yet"))
    reports = [(worker.worker_id, worker.report) for worker in transfers.workers if worker.report is not None]
    sections: list[RenderableType] = [_workers(transfers.workers)]
    for title, table in (
        ("under way", _live(reports)),
        ("since the start", _totals(reports)),
        ("transports chosen", _choices(reports)),
        ("gave way to the next transport", _fallbacks(reports)),
        ("failed last", _failures(reports)),
    ):
        if table.row_count:
            sections += [Text(), Text(title, "bold"), table]
    return Group(*sections)


def _workers(workers: Sequence[WorkerTransfers]) -> Table:
    table = plain_table("worker", "role", "address", "under way", "tickets", "leases", "")
    for worker in workers:
        report = worker.report
        counts = (report.num_live, report.num_tickets, report.num_leases) if report else ("", "", "")
        note = Text(f"no answer: {worker.error}" if report is None else "", "yellow")
        table.add_row(worker.worker_id, worker.role.value, worker.address, *map(str, counts), note)
    return table


def _live(reports: Reports) -> Table:
    table = plain_table("worker", "direction", "peer", "transport", "blocks", "size", "since", "request", "state")
    for worker_id, report in reports:
        for live in report.live[:_MAX_LIVE_SHOWN]:
            table.add_row(
                worker_id, live.direction.value, Text(live.peer), live.transport, str(live.num_blocks),
                words.size(live.num_bytes), _seconds(live.age_s), Text(live.request_id), Text(live.state),
            )  # fmt: skip
        if report.num_live > _MAX_LIVE_SHOWN:
            table.add_row(worker_id, Text(f"{report.num_live - _MAX_LIVE_SHOWN} more", "dim"))
    return table


def _totals(reports: Reports) -> Table:
    table = plain_table(
        "worker", "direction", "transport", "done", "aborted", "failed", "moved", "mean time", "mean rate"
    )
    for worker_id, report in reports:
        for total in report.totals:
            table.add_row(
                worker_id, total.direction.value, total.transport, str(total.num_done), str(total.num_aborted),
                Text(str(total.num_failed), "yellow" if total.num_failed else ""), words.size(total.num_bytes),
                _seconds(total.duration_s / total.num_done) if total.num_done else "",
                f"{words.size(total.num_bytes / total.duration_s)}/s" if total.duration_s else "",
            )  # fmt: skip
    return table


def _choices(reports: Reports) -> Table:
    table = plain_table("worker", "peer", "transport", "chosen", "why")
    for worker_id, report in reports:
        for choice in report.choices:
            table.add_row(worker_id, Text(choice.peer), choice.transport, _ago(choice.age_s), Text(choice.reason))
    return table


def _fallbacks(reports: Reports) -> Table:
    table = plain_table("worker", "from", "to", "times", "last", "reason")
    for worker_id, report in reports:
        for fallback in report.fallbacks:
            table.add_row(
                worker_id, fallback.from_transport, fallback.to_transport, str(fallback.count), _ago(fallback.age_s),
                Text(fallback.reason, "yellow"),
            )  # fmt: skip
    return table


def _failures(reports: Reports) -> Table:
    table = plain_table("worker", "when", "direction", "peer", "transport", "outcome", "moved", "request", "reason")
    for worker_id, report in reports:
        for failure in report.failures[:_MAX_FAILURES_SHOWN]:
            outcome = Text(failure.outcome.value.replace("_", " "), _OUTCOME_STYLES.get(failure.outcome, "yellow"))
            table.add_row(
                worker_id, _ago(failure.age_s), failure.direction.value, Text(failure.peer), failure.transport,
                outcome, words.size(failure.num_bytes), Text(failure.request_id), Text(failure.reason),
            )  # fmt: skip
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"
