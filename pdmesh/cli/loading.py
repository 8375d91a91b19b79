"""What a person sees while a cluster loads: bars on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from pdmesh.local.cluster import WorkerProcess

_LINE_EVERY_PERCENT = 25


@contextlib.contextmanager
def loading_display(console: Console) -> Iterator[Callable[[list[WorkerProcess]], None]]:
    """Yields what to call with the workers as they are now."""
    if not console.is_terminal:
        yield _Lines(console).show
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(32),
        TextColumn("{task.fields[phase]}"),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bars(progress).show


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def show(self, workers: list[WorkerProcess]) -> None:
        for worker in workers:
            if worker.worker_id not in self._tasks:
                self._tasks[worker.worker_id] = self._progress.add_task(worker.worker_id, total=None, phase="")
            loaded, total = _progress(worker)
            # Without a total the bar pulses.
            self._progress.update(
                self._tasks[worker.worker_id], completed=loaded, total=total or None, phase=_phase(worker)
            )


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: dict[str, str] = {}
        # When each was first seen to load, and how much it had by then.
        self._began: dict[str, tuple[float, int]] = {}

    def show(self, workers: list[WorkerProcess]) -> None:
        for worker in workers:
            phase, rate = _phase(worker), ""
            loaded, total = _progress(worker)
            if total and not worker.ready:
                percent = 100 * loaded // total // _LINE_EVERY_PERCENT * _LINE_EVERY_PERCENT
                phase = f"loading weights, {percent} % of {total / 1e6:.0f} MB"
                now = time.monotonic()
                began, first = self._began.setdefault(worker.worker_id, (now, loaded))
                if loaded > first:
                    rate = f", {(loaded - first) / 1e6 / (now - began):.0f} MB/s"
            if self._said.get(worker.worker_id) != phase:
                self._said[worker.worker_id] = phase
                self._console.print(f"{worker.worker_id}: {phase}{rate}")


def _phase(worker: WorkerProcess) -> str:
    if worker.ready:
        return "ready"
    loaded, total = _progress(worker)
    if total:
        return f"loading weights, {loaded / 1e6:.0f} of {total / 1e6:.0f} MB"
    return "starting" if worker.info is None else "loading"


def _progress(worker: WorkerProcess) -> tuple[int, int]:
    """Bytes of weights loaded, and in all; all of one where it is ready."""
    if worker.ready:
        return 1, 1
    return (worker.info.loaded_bytes, worker.info.total_bytes) if worker.info is not None else (0, 0)
