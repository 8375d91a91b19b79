"""This process's place in a group of ranks: what it computes of the model, and how it reaches the others."""

import contextlib
import os
import socket
import time
from pathlib import Path

import torch

from engine.api import RankInfo
from engine.cpu.library import Meetings
from engine.loader import LoadedModel, Split
from engine.model_config import ModelConfig
from engine.parallel.distributed import DistributedExchange
from engine.parallel.exchange import Exchange, GroupDownError
from engine.parallel.host_exchange import ExchangeSizes, HostExchange
from engine.parallel.kv_runs import held_runs
from engine.parallel.shard import Shard, shard_of
from engine.parallel.wire import Wire
from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.place import RankPlace
from pdmesh.types import BlockRun, MemoryFile

_LEADER = 0
# In which a follower of another node says who it is, once connected.
_HELLO_TIMEOUT_S = 5.0


class RankGroup:
    """Owns the sockets between leader and followers, and the exchange. `give_up` may be called on any thread.

    Args:
        config: Degrees.
        place: Of this process, as its supervisor told it.
    """

    def __init__(self, config: GroupConfig, place: RankPlace) -> None:
        self.config = config
        self.place = place
        self._exchange: Exchange | None = None
        self._given_up = ""
        self._listener = None if place.step_fd is None else socket.socket(fileno=place.step_fd)
        # To other ranks, by theirs; those of this node are connected already.
        self._socks = {rank: socket.socket(fileno=fd) for rank, fd in place.step_fds.items()}

    @property
    def leads(self) -> bool:
        return self.place.rank == _LEADER

    @property
    def moves_kv(self) -> bool:
        """Whether this rank moves its node's KV to other workers; at the leader's node, the leader does."""
        return self.place.node_rank > 0 and self.place.rank == self.config.local_ranks.start

    @property
    def split(self) -> Split:
        """For the loader."""
        return Split(self.config.tp, self.config.pp, self.place.rank, self._all_reduce)

    def device(self, device: torch.device) -> torch.device:
        """This rank's own, where the node has several."""
        local_rank = self.place.rank - self.place.node_rank * self.place.local_size
        return torch.device("cuda", local_rank) if device.type == "cuda" else device

    def kv_share(self, loaded: LoadedModel, device: torch.device) -> float:
        """How much of each KV block lies in the memory that this rank's are taken from."""
        return kv_share(loaded.config, loaded.shard, device, self.config)

    def kv_runs(self, loaded: LoadedModel, block_bytes: int) -> tuple[BlockRun, ...]:
        """Which bytes of a KV block lie on this node."""
        config, model = self.config, loaded.config
        shards = [shard_of(model, tp=config.tp, pp=config.pp, rank=rank) for rank in config.local_ranks]
        return held_runs(shards, model.num_layers, block_bytes // (model.num_layers * model.num_kv_heads))

    def kv_memory(self, num_bytes: int) -> MemoryFile:
        """Where the ranks of this node have their KV blocks."""
        return MemoryFile(self.place.memory_fds["kv"], num_bytes)

    def open_exchange(
        self,
        loaded: LoadedModel,
        sizes: ExchangeSizes,
        *,
        kernels: Path | None,
        hidden_dtype: torch.dtype,
        device: torch.device,
    ) -> Exchange:
        """Joins the other ranks, who do the same.

        Args:
            kernels: Of this machine's CPU, where ranks compute on one host.
            hidden_dtype: Of what a stage passes on.

        Raises GroupDownError where one of them is lost meanwhile.
        """
        if kernels is not None and self.place.nnodes == 1:
            descriptor = self.place.memory_fds["group"]
            self._exchange = HostExchange(descriptor, Meetings(kernels), loaded.shard, sizes)
        else:
            vocab_sizes = [
                len(shard_of(loaded.config, tp=self.config.tp, pp=self.config.pp, rank=rank).vocab)
                for rank in range(self.config.tp)
            ]
            self._exchange = DistributedExchange(
                self.place,
                loaded.shard,
                hidden_size=sizes.hidden_size,
                vocab_sizes=vocab_sizes,
                dtype=hidden_dtype,
                device=device,
            )
        self._check()
        return self._exchange

    def to_followers(self) -> list[Wire]:
        """At the leader: to each follower, by rank. Waits for those of other nodes. Raises GroupDownError."""
        while len(self._socks) < self.place.size - 1:
            assert self._listener is not None
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                raise self._down() from error
            if (rank := self._greeted(sock)) is None or rank in self._socks:
                sock.close()
            else:
                self._socks[rank] = sock
        self._check()
        return [Wire(_prompt(self._socks[rank]), f"rank {rank}") for rank in sorted(self._socks)]

    def to_leader(self) -> Wire:
        """At a follower. Raises GroupDownError."""
        if _LEADER not in self._socks:
            try:
                sock = socket.create_connection((self.place.leader_host, self.place.step_port))
                self._socks[_LEADER] = sock
                sock.sendall(self._greeting(self.place.rank))
            except OSError as error:
                raise GroupDownError(f"rank 0 cannot be reached: {error}") from error
        self._check()
        return Wire(_prompt(self._socks[_LEADER]), "rank 0")

    def give_up(self, reason: str) -> None:
        """Has whatever waits for another rank end with GroupDownError, now and from now on."""
        self._given_up = reason
        for sock in (self._listener, *self._socks.copy().values()):
            with contextlib.suppress(OSError):
                if sock is not None:
                    sock.shutdown(socket.SHUT_RDWR)
        if self._exchange is not None:
            self._exchange.give_up(reason)

    def close(self) -> None:
        for sock in (self._listener, *self._socks.values()):
            if sock is not None:
                sock.close()

    def info(self, loaded_bytes: int, kv_bytes: int) -> RankInfo:
        return RankInfo(self.place.rank, self.place.host, os.getpid(), loaded_bytes, kv_bytes)

    def _all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        assert self._exchange is not None, "nothing computes before the exchange is open"
        return self._exchange.all_reduce(partial)

    def _greeting(self, rank: int) -> bytes:
        return f"{self.place.token} {rank}\n".encode()

    def _greeted(self, sock: socket.socket) -> int | None:
        """Which rank has connected; None where it is none of ours."""
        expected = {self._greeting(rank): rank for rank in range(1, self.place.size)}
        said = b""
        deadline = time.monotonic() + _HELLO_TIMEOUT_S
        try:
            while not said.endswith(b"\n") and len(said) < 256:
                # All of it: nobody else is heard meanwhile.
                sock.settimeout(max(deadline - time.monotonic(), 0.001))
                said += sock.recv(1) or b"\n"
            sock.settimeout(None)
        except OSError:
            return None
        return expected.get(said)

    def _check(self) -> None:
        if self._given_up:
            raise self._down()

    def _down(self) -> GroupDownError:
        return GroupDownError(self._given_up or "the group of ranks was given up")


def kv_share(model: ModelConfig, shard: Shard, device: torch.device, group: GroupConfig) -> float:
    """How much of each KV block lies in the memory that a rank's are taken from: its node's, or its GPU's."""
    if device.type == "cpu":
        return group.local_size / group.size
    return len(shard.kv_heads) * len(shard.layers) / (model.num_kv_heads * model.num_layers)


def _prompt(sock: socket.socket) -> socket.socket:
    """A step is one small message: it is not to wait for a second."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
