"""What a node says of itself to node 0, which takes it only where both were told the same."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pdmesh.errors import ConfigError
from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.link import Message

PROTOCOL = 1
# What each node may be told differently.
_NODES_OWN = ("--node-rank", "--host", "--advertise")


@dataclass(frozen=True, slots=True)
class Hello:
    """A node's number and what it was told to run."""

    node_rank: int
    nnodes: int
    tp: int
    pp: int
    digest: str

    @classmethod
    def of(cls, config: GroupConfig, command: Sequence[str]) -> Self:
        return cls(config.node_rank, config.nnodes, config.tp, config.pp, command_digest(command))

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """Raises ConfigError, for the node that sent it, where that runs another version of this program."""
        hello = message.get("hello")
        numbers = ("node_rank", "nnodes", "tp", "pp")
        if (
            message.get("protocol") != PROTOCOL
            or not isinstance(hello, dict)
            or set(hello) != {*numbers, "digest"}
            or any(type(hello[name]) is not int for name in numbers)
        ):
            raise ConfigError("node 0 runs another version of pdmesh: install the same on every node")
        return cls(**hello)

    def to_message(self) -> Message:
        return {"protocol": PROTOCOL, "hello": dataclasses.asdict(self)}

    def check(self, other: "Hello") -> None:
        """Raises ConfigError, for the node that said `other`, where it does not fit node 0, which is this."""
        ours, theirs = (f"--tp {of.tp} --pp {of.pp} --nnodes {of.nnodes}" for of in (self, other))
        if ours != theirs:
            raise ConfigError(f"this node was started with {theirs}, node 0 with {ours}: start all nodes alike")
        if not 0 < other.node_rank < self.nnodes:
            raise ConfigError(f"--node-rank is {other.node_rank}: must lie in [1, {self.nnodes}) to join node 0")
        if self.digest != other.digest:
            raise ConfigError(
                f"this node's command line is not node 0's: start all nodes alike but for {', '.join(_NODES_OWN)}"
            )


def command_digest(command: Sequence[str]) -> str:
    """Of what all nodes must be told alike: the command line without the interpreter's path and a node's own flags."""
    shared: list[str] = []
    arguments = iter(command[1:])
    for argument in arguments:
        flag, has_value, _ = argument.partition("=")
        if flag not in _NODES_OWN:
            shared.append(argument)
        elif not has_value:
            next(arguments, None)
    return hashlib.sha256("\0".join(shared).encode()).hexdigest()
