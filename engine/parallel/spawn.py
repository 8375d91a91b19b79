"""A group of ranks on this machine without a supervisor: this process leads it, and starts the followers.

For whoever embeds an engine, and for tests and benches. Workers are supervised instead (pdmesh/ranks): here, a follower
that is lost in the middle of a step leaves the leader waiting for it until somebody calls `RankGroup.give_up`. The
followers do not outlive this process, however it ends.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace

from engine.config import EngineConfig
from engine.parallel.follower import follow
from engine.parallel.group import RankGroup
from pdmesh.kv_memory import memory_file
from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.control import RankControl
from pdmesh.ranks.place import ENV_NAME, RankPlace

_END_TIMEOUT_S = 20.0


@contextmanager
def spawned_group(config: EngineConfig, *, tp: int = 1, pp: int = 1) -> Iterator[RankGroup]:
    """The leader's group, for `assemble` or `LocalEngine`, with its followers running. They end with it."""
    size = tp * pp
    with ExitStack() as stack:
        store = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        memory_fds = {name: memory_file() for name in ("kv", "group")}
        for descriptor in memory_fds.values():
            stack.callback(os.close, descriptor)
        pairs = {rank: socket.socketpair() for rank in range(1, size)}
        # A follower sees by its end that this process, which alone has the other end, is gone.
        own_end, control = socket.socketpair()
        stack.enter_context(own_end)
        stack.enter_context(control)
        leader = RankPlace(
            rank=0,
            size=size,
            node_rank=0,
            nnodes=1,
            local_size=size,
            generation=0,
            host="127.0.0.1",
            leader_host="127.0.0.1",
            store_port=store.getsockname()[1],
            store_fd=store.fileno(),
            step_port=0,
            step_fd=None,
            token=secrets.token_hex(16),
            control_fd=control.fileno(),
            step_fds={rank: ours.detach() for rank, (ours, _) in pairs.items()},
            memory_fds=memory_fds,
        )
        followers = []
        for rank, (_, theirs) in pairs.items():
            place = replace(leader, rank=rank, store_fd=None, step_fds={0: theirs.fileno()})
            with theirs:
                followers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "engine.parallel.spawn", json.dumps([asdict(config), tp, pp])],
                        env={**os.environ, ENV_NAME: place.to_json()},
                        pass_fds=place.descriptors,
                    )
                )
        group = RankGroup(GroupConfig(tp=tp, pp=pp), leader)
        try:
            yield group
        finally:
            # A follower ends when its leader closes the connection; or in the middle of a step, if that failed.
            group.give_up("its leader ended the group")
            group.close()
            for follower in followers:
                _end(follower)


def _end(follower: "subprocess.Popen[bytes]") -> None:
    try:
        follower.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        follower.kill()
        follower.wait()


def main() -> None:
    config, tp, pp = json.loads(sys.argv[1])
    place = RankPlace.from_environment()
    assert place is not None
    RankControl(place.control_fd, lambda reason: os._exit(1))
    follow(EngineConfig(**config), RankGroup(GroupConfig(tp=tp, pp=pp), place))


if __name__ == "__main__":
    main()
