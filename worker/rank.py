"""A rank's process: rank 0 is the worker as everybody sees it, every other rank follows it.

Each tells its supervisor why it ends, which prints what a person must mend.
"""

import logging
import os
import signal
import sys
from typing import NoReturn

from engine.local_engine import LocalEngine
from engine.parallel.follower import follow
from engine.parallel.group import RankGroup
from pdmesh.errors import ConfigError, MeshError
from pdmesh.ranks.control import RankControl
from pdmesh.ranks.place import RankPlace
from pdmesh.server import Service, run
from worker.config import WorkerConfig
from worker.node import move_kv
from worker.ranks import MakeService

log = logging.getLogger(__name__)


def run_rank(config: WorkerConfig, place: RankPlace, make_service: MakeService, transports: tuple[str, ...]) -> None:
    """Runs the rank at `place` until it ends; arguments and exit codes as `worker.ranks.run_worker`."""
    group = RankGroup(config.group, place)
    if not group.leads:
        _follow(config, group, transports)
        return
    # Before the event loop, which it reaches as soon as there is one.
    engine = LocalEngine(config.engine, group=group)
    control = RankControl(place.control_fd, engine.give_up)
    try:
        run(lambda: _Leader(make_service(engine), control), drain_s=config.service.drain_s, refuse=_refuse)
    except SystemExit as end:
        # All is said and closed. As the interpreter ends, torch would wait for ranks that are gone.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def _refuse(message: str) -> NoReturn:
    # The supervisor was told, and prints it: several ranks may have found the same.
    raise SystemExit(2)


class _Leader:
    """A worker's service that tells its supervisor how it fares."""

    def __init__(self, service: Service, control: RankControl) -> None:
        self._service = service
        self._control = control

    async def start(self) -> None:
        try:
            await self._service.start()
        except MeshError as error:
            self._failed(error)
            raise
        self._control.ready()

    async def drain_asked(self) -> None:
        try:
            await self._service.drain_asked()
        except MeshError as error:
            self._failed(error)
            raise

    def _failed(self, error: MeshError) -> None:
        self._control.failed(error.message, fatal=isinstance(error, ConfigError))

    async def drain(self) -> None:
        await self._service.drain()

    async def close(self) -> None:
        await self._service.close()


def _follow(config: WorkerConfig, group: RankGroup, transports: tuple[str, ...]) -> None:
    # They reach the leader, which drains while its followers go on.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    control = RankControl(group.place.control_fd, lambda reason: os._exit(1))
    try:
        follow(
            config.engine,
            group,
            move_kv=lambda kv_cache: move_kv(kv_cache, config.service, transports, group.place),
        )
    except ConfigError as error:
        control.failed(error.message, fatal=True)
        _refuse(error.message)
    except Exception as error:
        message = error.message if isinstance(error, MeshError) else f"{type(error).__name__}: {error}"
        log.exception("rank %d cannot go on", group.place.rank)
        control.failed(message, fatal=False)
        raise SystemExit(1) from error
