"""A worker's process, whichever of these it is: all of the worker, or of several ranks their supervisor or one of them.

python -m decode MODEL --tp 2      supervisor: starts the ranks with this same command line, and starts them again
    ├─ rank 0                      leader: the worker as everybody sees it
    └─ rank 1                      follower
"""

import os
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvstore.transfer.transports import TRANSPORTS
from pdmesh.config import ENV_PREFIX
from pdmesh.ranks.place import RankPlace
from pdmesh.ranks.supervisor import supervise
from worker.config import WorkerConfig

if TYPE_CHECKING:
    # Late, where they are needed: a supervisor starts its ranks before it could have imported what they compute with.
    from engine.local_engine import LocalEngine
    from pdmesh.server import Service

# Makes the worker's service around its engine.
MakeService = Callable[["LocalEngine"], "Service"]


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
        from worker.rank import run_rank

        run_rank(config, place, make_service, tuple(transports))
    elif config.group.size > 1:
        raise SystemExit(_supervise(config, module))
    else:
        from engine.local_engine import LocalEngine
        from pdmesh.server import run

        run(lambda: make_service(LocalEngine(config.engine, lend_kv=lend_kv)), drain_s=config.service.drain_s)


def _supervise(config: WorkerConfig, module: str) -> int:
    # One name for all the leader's lives; by the environment, since the ranks of other nodes are not told it.
    os.environ.setdefault(f"{ENV_PREFIX}WORKER_ID", config.worker_id or f"{module}-{secrets.token_hex(3)}")
    return supervise(config.group, (sys.executable, *sys.orig_argv[1:]), module)
