"""How far a run is: its counts, and how a person sees them; drawn over on a terminal, a line now and then elsewhere."""

import asyncio
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from pdmesh.batch.output_file import OutputFile
from pdmesh.errors import MeshError

LINE_EVERY_S = 5.0
_DRAW_EVERY_S = 0.5
# Tokens a second are those of so many last seconds.
_RATE_OVER_S = 15.0


class Progress:
    """Counts of one run; a batch that goes on has results from runs before.

    Attributes:
        num_tokens: Output tokens that came in this run, of attempts that failed too.
        first_failure: The line and the error of this run's first result that is one; empty if none is.
    """

    def __init__(self, output: OutputFile, num_requests: int) -> None:
        self.num_tokens = 0
        self.num_requests = num_requests
        self.first_failure = ""
        self._output = output
        self._num_before = output.num_finished
        self._started_at = time.monotonic()
        self._samples = deque([(self._started_at, 0)])

    def failed(self, line_number: int, error: MeshError) -> None:
        self.first_failure = self.first_failure or f"line {line_number}: {error.message}"

    @property
    def num_finished(self) -> int:
        return self._output.num_finished

    @property
    def num_failed(self) -> int:
        return self._output.num_failed

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_at

    def tokens_per_s(self) -> float:
        """Of the last seconds, up to now."""
        now = time.monotonic()
        self._samples.append((now, self.num_tokens))
        while self._samples[0][0] < now - _RATE_OVER_S:
            self._samples.popleft()
        since, num_then = self._samples[0]
        return (self.num_tokens - num_then) / (now - since) if now > since else 0.0

    def time_left_s(self) -> float | None:
        """At this run's mean pace; None while there is none."""
        num_new = self.num_finished - self._num_before
        return (self.num_requests - self.num_finished) * self.elapsed_s / num_new if num_new else None

    def line(self) -> str:
        left_s = self.time_left_s()
        parts = [
            f"{self.num_finished:,} of {self.num_requests:,} done",
            f"{self.num_failed:,} failed",
            f"{self.tokens_per_s():,.0f} tokens/s",
            f"{duration(left_s)} left" if left_s is not None else "time left unknown",
        ]
        return " · ".join(parts)

    def summary(self) -> str:
        """What the whole batch came to, and what this run took."""
        text = f"{self.num_finished - self.num_failed:,} of {self.num_requests:,} succeeded, {self.num_failed:,} failed"
        if self.first_failure:
            text += f" (the first of this run: {self.first_failure})"
        if self.num_finished == self._num_before:
            return text
        mean = self.num_tokens / self.elapsed_s if self.elapsed_s else 0.0
        return f"{text}; {self.num_tokens:,} tokens in {duration(self.elapsed_s)}, {mean:,.0f} tokens/s"


def duration(seconds: float) -> str:
    """Two units at most: "42 s", "7 min 05 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


async def show(progress: Progress, console: Console) -> None:
    """Runs until it is cancelled."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(LINE_EVERY_S)
            console.print(progress.line(), soft_wrap=True)
    columns = (BarColumn(32), TextColumn("{task.description}"))
    with Bars(*columns, console=console, transient=True, auto_refresh=False) as bars:
        task = bars.add_task(progress.line(), total=progress.num_requests)
        while True:
            bars.update(task, completed=progress.num_finished, description=progress.line(), refresh=True)
            await asyncio.sleep(_DRAW_EVERY_S)
