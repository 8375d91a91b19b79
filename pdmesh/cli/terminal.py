"""How commands look: one console, one kind of table."""

from rich.console import Console
from rich.table import Table

# Wide enough that no table of ours folds in a file or a pipe.
_PIPE_WIDTH = 240


def make_console(*, stderr: bool = False) -> Console:
    console = Console(highlight=False, stderr=stderr)
    return console if console.is_terminal else Console(highlight=False, stderr=stderr, width=_PIPE_WIDTH)


def plain_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, no_wrap=name != "")
    return table
