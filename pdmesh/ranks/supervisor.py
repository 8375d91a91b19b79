"""What a command becomes that has more than one rank: it starts them, watches them and starts them again."""

import asyncio
import signal
import sys
from collections.abc import Sequence

from pdmesh.errors import ConfigError
from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.follower import FollowerSupervisor
from pdmesh.ranks.leader import LeaderSupervisor


def supervise(config: GroupConfig, command: Sequence[str], name: str) -> int:
    """Runs this node's ranks of a group until it is done. On the main thread; Linux only.

    Every rank is `command` with its `RankPlace` in the environment. SIGTERM and SIGINT reach rank 0 once each, on
    whichever node they come; it drains and exits 0. A rank that ends or stands still, and a node that is lost, takes
    the group down within 1.5 s; then it starts again, as often as it takes. A group that never served does not, nor
    one that a person must mend something for.

    Args:
        config: The group, and which node this is.
        command: Every rank's command line, the same on all nodes but for their own flags (see `pdmesh.ranks.hello`).
        name: The service's, for people.

    Returns:
        The exit code: 0 where rank 0 exited 0 or a stop was asked for between generations, 2 where a person must mend
        something, else the one of the rank that ended the group (128 and the signal's number where one did).
    """
    try:
        if sys.platform != "linux":
            raise ConfigError("several ranks need Linux: leave out --tp and --pp, or run in a container")
        return asyncio.run(_supervise(config, command, name))
    except ConfigError as error:
        print(f"pdmesh: {error.message}", file=sys.stderr)
        return 2


async def _supervise(config: GroupConfig, command: Sequence[str], name: str) -> int:
    supervisor = (FollowerSupervisor if config.node_rank else LeaderSupervisor)(config, command, name)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.on_signal, number)
    return await supervisor.run()
