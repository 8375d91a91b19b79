"""A worker's process, whichever of these it is: all of the worker, or of several ranks their supervisor or one of them.

python -m decode MODEL --tp 2      supervisor: starts the ranks with this same command line, and starts them again
    ├─ rank 0                      leader: the worker as everybody sees it
    └─ rank 1                      follower
"""

import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvstore.transfer.senders import TRANSPORTS
from pdmesh.config import ENV_PREFIX, fail
from pdmesh.errors import ConfigError, MeshError
from pdmesh.ranks.control import RankControl
from pdmesh.ranks.place import RankPlace
from pdmesh.ranks.supervisor import supervise
from pdmesh.server import Service, run
from worker.config import WorkerConfig

if TYPE_CHECKING:
    from engine.local_engine import LocalEngine
    from engine.parallel.group import RankGroup

log = logging.getLogger(__name__)

# Makes the worker's service around its engine.
MakeService = Callable[["LocalEngine"], Service]


def run_worker(
    config: WorkerConfig,
    module: str,
    make_service: MakeService,
    *,
    lend_kv: bool,
    transports: Sequence[str] = TRANSPORTS,
) -> None:
    """Runs this process's part of a worker until it ends; exit codes as `pdmesh.server.run`.

    Args:
        module: That `python -m` runs.
        make_service: Called where this process is the one that serves. What computes is imported by then, and not
            before: a supervisor has no use for it.
        lend_kv: As LocalEngine says.
        transports: That KV may take to and from nodes that are not the leader's.
    """
    place = RankPlace.from_environment()
    if place is not None:
        _run_rank(config, place, make_service, tuple(transports))
    elif config.group.size > 1:
        raise SystemExit(_supervise(config, module))
    else:
        from engine.local_engine import LocalEngine

        run(lambda: make_service(LocalEngine(config.engine, lend_kv=lend_kv)), drain_s=config.service.drain_s)


def _supervise(config: WorkerConfig, module: str) -> int:
    # One name for all the leader's lives; by the environment, since the ranks of other nodes are not told it.
    os.environ.setdefault(f"{ENV_PREFIX}WORKER_ID", config.worker_id or f"{module}-{secrets.token_hex(3)}")
    return supervise(config.group, (sys.executable, *sys.orig_argv[1:]), module)


def _run_rank(config: WorkerConfig, place: RankPlace, make_service: MakeService, transports: tuple[str, ...]) -> None:
    from engine.local_engine import LocalEngine
    from engine.parallel.group import RankGroup

    group = RankGroup(config.group, place)
    if not group.leads:
        _follow(config, group, transports)
        return
    # Before the event loop, which it reaches as soon as there is one.
    engine = LocalEngine(config.engine, group=group)
    control = RankControl(place.control_fd, engine.give_up)
    try:
        run(lambda: _Leader(make_service(engine), control), drain_s=config.service.drain_s)
    except SystemExit as end:
        # All is said and closed. As the interpreter ends, torch would wait for ranks that are gone.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


class _Leader:
    """A worker's service that tells its supervisor how it fares."""

    def __init__(self, service: Service, control: RankControl) -> None:
        self._service = service
        self._control = control

    async def start(self) -> None:
        try:
            await self._service.start()
        except MeshError as error:
            self._control.failed(error.message, fatal=isinstance(error, ConfigError))
            raise
        self._control.ready()

    async def drain_asked(self) -> None:
        try:
            await self._service.drain_asked()
        except MeshError as error:
            self._control.failed(error.message, fatal=False)
            raise

    async def drain(self) -> None:
        await self._service.drain()

    async def close(self) -> None:
        await self._service.close()


def _follow(config: WorkerConfig, group: "RankGroup", transports: tuple[str, ...]) -> None:
    from engine.parallel.follower import follow
    from worker.node import move_kv

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
        fail(error.message)
    except Exception as error:
        message = error.message if isinstance(error, MeshError) else f"{type(error).__name__}: {error}"
        log.exception("rank %d cannot go on", group.place.rank)
        control.failed(message, fatal=False)
        raise SystemExit(1) from error
