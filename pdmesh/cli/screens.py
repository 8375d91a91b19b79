"""What `--json` and `--watch` mean, the same for every command that shows a state."""

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.live import Live

from pdmesh.cli.json_output import to_json

T = TypeVar("T")

_WATCH_S = 1.0


def show(
    fetch: Callable[[], T], draw: Callable[[T], RenderableType], console: Console, *, json: bool, watch: bool
) -> None:
    """Prints what `fetch` returns, as JSON or as `draw` draws it; with `watch` anew every second, until Ctrl-C.

    A terminal is drawn over; a pipe or a file gets one state after the other.
    """

    def once() -> None:
        if json:
            print(to_json(fetch()), flush=True)
        else:
            console.print(draw(fetch()))

    if not watch:
        once()
        return
    with contextlib.suppress(KeyboardInterrupt):
        if json or not console.is_terminal:
            while True:
                once()
                time.sleep(_WATCH_S)
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(draw(fetch()), refresh=True)
                time.sleep(_WATCH_S)
