"""The figures as tables for a person: a row for each case, a column for each figure."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from bench.parallel.figures import MAX_MEMORY_SHARE, MAX_PIPELINE_RATIO, MAX_SUM_RATIO, MIN_SPEEDUP, Figures

Rows = Sequence[tuple[str, Figures]]


def decode_table(rows: Rows) -> Table:
    return _table(
        f"decode, tokens/s; speedup at TP 2 at least {MIN_SPEEDUP}",
        rows,
        {
            "one rank": "{alone_tokens_per_s:.1f}",
            "group": "{together_tokens_per_s:.1f}",
            "ranks apart": "{apart_tokens_per_s:.1f}",
            "speedup": "{speedup:.2f}",
            "limit": "{limit:.2f}",
            "share of limit": "{share_of_limit:.2f}",
        },
    )


def memory_table(rows: Rows) -> Table:
    return _table(
        f"memory of the largest rank, MiB; shares of one rank's at most {MAX_MEMORY_SHARE} at TP 2",
        rows,
        {
            "weights": "{weights_mib:.0f}",
            "KV": "{kv_mib:.0f}",
            "share": "{said_share:.2f}",
            "own": "{own_mib:.0f}",
            "share of it": "{own_share:.2f}",
            "Pss": "{share_mib:.0f}",
            "share of that": "{pss_share:.2f}",
            "loading": "{loading_mib:.0f}",
            "of weights + file": "{loading_ratio:.2f}",
        },
    )


def sum_table(rows: Rows) -> Table:
    return _table(
        f"sums over two ranks; of Gloo's time at most {MAX_SUM_RATIO} for a hidden state",
        rows,
        {
            "ours, µs": "{ours_us:.1f}",
            "Gloo, µs": "{gloo_us:.1f}",
            "ours, GiB/s": "{ours_gib_per_s:.2f}",
            "Gloo, GiB/s": "{gloo_gib_per_s:.2f}",
            "ratio": "{ratio:.2f}",
        },
    )


def pipeline_table(rows: Rows) -> Table:
    return _table(
        f"a prompt over two stages, ms; of the ideal at most {MAX_PIPELINE_RATIO} at the most micro-batches",
        rows,
        {
            "one rank": "{alone_ms:.0f}",
            "stages apart": "{apart_ms:.0f}",
            "pipeline": "{pipeline_ms:.0f}",
            "ideal": "{ideal_ms:.0f}",
            "ratio": "{ratio:.2f}",
        },
    )


def _table(title: str, rows: Rows, columns: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for label, figures in rows:
        table.add_row(label, *(cell.format(**figures) for cell in columns.values()))
    return table
