"""A local cluster's life.

    start -> every worker loaded, health SERVING -> watch: who ends is started again -> stop: drain, end, nothing left

While it starts, the end of any process is the end of the start: something is wrong that trying again will not mend.
"""

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdmesh.async_client import AsyncClient
from pdmesh.channels import ChannelPool
from pdmesh.errors import ConfigError, MeshError
from pdmesh.health import is_serving
from pdmesh.local.child import ChildProcess, how_it_ended
from pdmesh.local.commands import cluster_commands
from pdmesh.local.config import LocalConfig
from pdmesh.types import WorkerInfo, WorkerState

_POLL_S = 0.1
_POLL_TIMEOUT_S = 5.0
# Longer than the services' own drain, so that they end by themselves.
_STOP_MARGIN_S = 5.0
_FIRST_RESTART_S = 0.5
_LAST_RESTART_S = 30.0
# Who ran this long before it ended is started again without delay.
_STEADY_S = 60.0


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """One worker or store of ours. `info` is None until the router knows it."""

    worker_id: str
    pid: int | None
    info: WorkerInfo | None

    @property
    def ready(self) -> bool:
        return self.info is not None and self.info.state is WorkerState.READY


class LocalCluster:
    """Starts, watches and stops the processes; `stop` frees everything, also after a failed `start`.

    Args:
        config: What to run.
        report: Told in one line of what a person should know: a worker that ended, a restart.
    """

    def __init__(self, config: LocalConfig, report: Callable[[str], None]) -> None:
        config.check_model()
        self.config = config
        port = config.free_port()
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
        self.address = f"{host}:{port}"
        self.run_dir = _make_run_dir(config.run_dir)
        self._report = report
        commands = cluster_commands(config, port, self.run_dir)
        self.redis_url = commands.redis_url
        self._valkey = ChildProcess(commands.valkey, self.run_dir) if commands.valkey else None
        self._router = ChildProcess(commands.router, self.run_dir)
        self._workers = {name: ChildProcess(spec, self.run_dir) for name, spec in commands.workers.items()}
        self._stores = {name: ChildProcess(spec, self.run_dir) for name, spec in commands.stores.items()}

    @property
    def children(self) -> list[ChildProcess]:
        """Valkey first, then the router, then the workers, then the stores."""
        return [*([self._valkey] if self._valkey else []), self._router, *self._members.values()]

    @property
    def _members(self) -> dict[str, ChildProcess]:
        """Whoever registers in the directory and can be drained."""
        return {**self._workers, **self._stores}

    async def start(self, on_progress: Callable[[list[WorkerProcess]], None]) -> list[WorkerProcess]:
        """Returns when all workers and stores serve. Raises ConfigError where a process ends before that."""
        for child in self.children:
            await child.start()
        ends = {asyncio.create_task(child.wait()): child for child in self.children}
        loading = asyncio.create_task(self._loaded(on_progress))
        try:
            done, _ = await asyncio.wait({*ends, loading}, return_when=asyncio.FIRST_COMPLETED)
            for task, child in ends.items():
                if task in done:
                    raise ConfigError(_failure(child, task.result()))
            return await loading
        finally:
            await _cancel(loading, *ends)

    async def _loaded(self, on_progress: Callable[[list[WorkerProcess]], None]) -> list[WorkerProcess]:
        channels = ChannelPool()
        async with AsyncClient(self.address) as client, contextlib.aclosing(channels):
            while True:
                workers = await self._workers_now(client)
                on_progress(workers)
                if all(worker.ready for worker in workers) and await is_serving(channels.get(self.address)):
                    return workers
                await asyncio.sleep(_POLL_S)

    async def _workers_now(self, client: AsyncClient) -> list[WorkerProcess]:
        try:
            views = await client.workers(timeout_s=_POLL_TIMEOUT_S)
        except MeshError:
            # The router does not listen yet. If it never does, its process ends, and that is seen.
            views = ()
        infos = {view.info.worker_id: view.info for view in views}
        return [WorkerProcess(name, child.pid, infos.get(name)) for name, child in self._members.items()]

    async def watch(self) -> None:
        """Starts again what ends, until cancelled; returns if all workers were drained."""
        workers = [asyncio.create_task(self._keep(child)) for child in self._workers.values()]
        others = [asyncio.create_task(self._keep(child)) for child in self.children if child.name not in self._workers]
        try:
            await asyncio.gather(*workers)
        finally:
            await _cancel(*others, *workers)

    async def _keep(self, child: ChildProcess) -> None:
        delay_s = _FIRST_RESTART_S
        while True:
            exit_code = await child.wait()
            if exit_code == 0 and child.name in self._members:
                self._report(f"{child.name} was drained and left")
                return
            if time.monotonic() - child.started_at > _STEADY_S:
                delay_s = _FIRST_RESTART_S
            self._report(
                f"{child.name} {how_it_ended(exit_code)}; starting it again in {delay_s:g} s ({child.log_path})"
            )
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LAST_RESTART_S)
            await child.start()

    async def stop(self) -> None:
        """Lets running requests end, for `drain_s` at most, and ends every process. Idempotent; cancelling is safe.

        The router goes first, so that requests end where they run before their workers do; the stores go after these.
        """
        grace_s = self.config.drain_s + _STOP_MARGIN_S
        try:
            await self._router.stop(grace_s)
            await asyncio.gather(*(child.stop(grace_s) for child in self._workers.values()))
            await asyncio.gather(*(child.stop(grace_s) for child in self._stores.values()))
            if self._valkey is not None:
                await self._valkey.stop(_STOP_MARGIN_S)
        finally:
            for child in self.children:
                child.kill()
            await asyncio.gather(*(child.wait() for child in self.children if child.running))

    def remove_logs(self) -> None:
        """For who has no use for them once the cluster has stopped."""
        shutil.rmtree(self.run_dir, ignore_errors=True)


def _failure(child: ChildProcess, exit_code: int) -> str:
    words = child.last_words()
    if len(words) == 1:
        return f"{child.name} could not start: {words[0]}\n(its log: {child.log_path})"
    end = "".join(f"\n    {line}" for line in words)
    return f"{child.name} {how_it_ended(exit_code)} while starting. The end of its log, {child.log_path}:{end}"


def _make_run_dir(run_dir: str | None) -> Path:
    if run_dir is None:
        return Path(tempfile.mkdtemp(prefix="pdmesh-"))
    path = Path(run_dir).expanduser().resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
