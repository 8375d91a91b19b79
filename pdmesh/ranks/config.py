"""How many ranks a model is divided among, and on how many nodes."""

from dataclasses import dataclass

from pdmesh.config import option
from pdmesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """Node n holds the ranks n * local_size … (n + 1) * local_size - 1; every node is told the same but its number."""

    tp: int = option("ranks that share every layer's heads and rows (tensor parallel)", default=1)
    pp: int = option("stages that the layers are divided into (pipeline parallel)", default=1)
    nnodes: int = option("machines that the ranks are spread over", default=1)
    node_rank: int = option("which of these machines this is, from 0", default=0)
    rendezvous: str | None = option(
        "host:port at which node 0 waits for the other nodes; with more than one", default=None
    )

    def __post_init__(self) -> None:
        for flag, value in (("--tp", self.tp), ("--pp", self.pp), ("--nnodes", self.nnodes)):
            if value < 1:
                raise ConfigError(f"{flag} is {value}: must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"--node-rank is {self.node_rank}: must lie in [0, {self.nnodes}), as --nnodes is {self.nnodes}"
            )
        if self.size % self.nnodes:
            raise ConfigError(
                f"--nnodes is {self.nnodes}: must divide the {self.size} ranks that --tp {self.tp} and --pp {self.pp} "
                "make, so that every node has as many"
            )
        if self.nnodes == 1 and self.rendezvous is not None:
            raise ConfigError("--rendezvous joins several nodes: give --nnodes too, or leave it out")
        if self.nnodes > 1:
            self._check_rendezvous()

    def _check_rendezvous(self) -> None:
        if self.rendezvous is None:
            raise ConfigError(
                f"--nnodes is {self.nnodes}: say with --rendezvous host:port where node 0 waits for the others"
            )
        host, colon, port = self.rendezvous.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) <= 65535):
            raise ConfigError(f"--rendezvous is {self.rendezvous!r}: write host:port, such as 10.0.0.1:29400")
        if self.leader_host in ("0.0.0.0", "::"):
            raise ConfigError(
                f"--rendezvous is {self.rendezvous!r}: name node 0's address as the other nodes reach it, not every "
                "address"
            )

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp

    @property
    def local_size(self) -> int:
        """Ranks of each node."""
        return self.size // self.nnodes

    @property
    def local_ranks(self) -> range:
        """This node's ranks."""
        return range(self.node_rank * self.local_size, (self.node_rank + 1) * self.local_size)

    @property
    def leader_host(self) -> str:
        """Node 0's address as every node reaches it."""
        return "127.0.0.1" if self.rendezvous is None else self.rendezvous.rpartition(":")[0].strip("[]")

    @property
    def rendezvous_port(self) -> int:
        """0 with one node, which needs none."""
        return 0 if self.rendezvous is None else int(self.rendezvous.rpartition(":")[2])
