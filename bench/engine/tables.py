"""The report's figures as tables for a person."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def throughput_table(report: dict[str, Any]) -> Table:
    """Of what `throughput.measure` returns."""
    limits = report["limits"]["best"]
    table = Table(
        title="tokens/s, medians; "
        f"memory read at {limits['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"matrices multiplied at {limits['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s at best",
        title_justify="left",
    )
    peers = [name for name in report["engines"] if name != "ours"]
    table.add_column("point")
    for name in ("ours", *peers, "ours / best peer", "share of limit", "spread"):
        table.add_column(name, justify="right")
    for point, figures in report["points"].items():
        ratio = figures["ratio_to_best"]
        table.add_row(
            point,
            f"{figures['ours']:.0f}",
            *(f"{figures['peers'][name]:.0f}" for name in peers),
            "" if ratio is None else f"{ratio:.2f}",
            f"{figures['share_of_limit']:.2f}",
            f"{figures['spread']['ours']:.0%}",
        )
    return table


def figures_table(title: str, figures: Mapping[str, float]) -> Table:
    """One figure a line."""
    table = Table(title=title, title_justify="left", show_header=False, min_width=len(title) + 2)
    table.add_column()
    table.add_column(justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.3f}" if value < 10 else f"{value:,.0f}")
    return table


def columns_table(title: str, report: Mapping[str, Mapping[str, float]]) -> Table:
    """A column for each of what was measured alike."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in report:
        table.add_column(name, justify="right")
    for figure in next(iter(report.values())):
        table.add_row(figure, *(f"{figures[figure]:,.2f}" for figures in report.values()))
    return table


def operations_table(report: Mapping[str, Mapping[str, float]]) -> Table:
    """Of what `operations.measure` returns: a column for each step, milliseconds."""
    table = Table(title="milliseconds of a step, by operation", title_justify="left")
    table.add_column("operation")
    for step in report:
        table.add_column(step, justify="right")
    for name in next(iter(report.values())):
        table.add_row(name.removesuffix("_ms"), *(f"{figures[name]:.2f}" for figures in report.values()))
    return table
