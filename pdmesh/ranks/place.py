"""What a rank process is told of its place in the group: JSON in one environment variable."""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from pdmesh.errors import ConfigError

ENV_NAME = "PDMESH_RANK"


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One rank's place in one generation of its group. Descriptors are this process's own, to close or to keep.

    Attributes:
        rank: From 0; rank 0 leads.
        size: Ranks of the group.
        node_rank: The node that this rank is on, from 0.
        nnodes: Nodes of the group.
        local_size: Ranks of each node.
        generation: Counts the starts of the group, from 0.
        host: This node's address as other nodes reach it.
        leader_host: Node 0's.
        store_port: TCP port at `leader_host` for torch.distributed's store.
        store_fd: Rank 0: the socket that listens there already, so that nobody else can take the port.
        step_port: TCP port at `leader_host` at which rank 0 takes the followers of other nodes; 0 with one node.
        step_fd: Rank 0, with several nodes: the socket that listens there already.
        token: Secret of this generation, which a follower of another node shows to rank 0.
        control_fd: This rank's socket to its supervisor; for `RankControl`.
        step_fds: Stream sockets by the rank at the other end: rank 0 has one to each follower of its node, and each
            of these one to rank 0; empty on other nodes.
        memory_fds: Memory files that the ranks of this node share, empty at first: "kv" and "group".
    """

    rank: int
    size: int
    node_rank: int
    nnodes: int
    local_size: int
    generation: int
    host: str
    leader_host: str
    store_port: int
    store_fd: int | None
    step_port: int
    step_fd: int | None
    token: str
    control_fd: int
    step_fds: dict[int, int]
    memory_fds: dict[str, int]

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All that this rank inherits."""
        single = (self.control_fd, self.store_fd, self.step_fd)
        return (*(fd for fd in single if fd is not None), *self.step_fds.values(), *self.memory_fds.values())

    def to_json(self) -> str:
        """For the environment of the rank's process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankPlace":
        """Raises ConfigError where `text` is none."""
        try:
            values: dict[str, Any] = json.loads(text)
            values["step_fds"] = {int(rank): fd for rank, fd in values["step_fds"].items()}
            place = cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{ENV_NAME} is {text[:80]!r}: only the supervisor of a group of ranks sets it; unset it"
            ) from error
        return place

    @classmethod
    def from_environment(cls) -> "RankPlace | None":
        """This process's place; None where it is no rank. Raises ConfigError where the variable is damaged.

        From here on what this process starts inherits none of the descriptors: it would keep alive what a rank's end
        must close.
        """
        text = os.environ.get(ENV_NAME)
        if text is None:
            return None
        place = cls.from_json(text)
        try:
            for fd in place.descriptors:
                os.set_inheritable(fd, False)
        except OSError as error:
            raise ConfigError(
                f"{ENV_NAME} names descriptors that this process did not inherit: only the supervisor of a group of "
                "ranks sets it; unset it"
            ) from error
        return place
