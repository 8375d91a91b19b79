"""Starts the ranks of one node and gives each what it inherits; this process keeps only its lines to them."""

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from pdmesh.errors import ConfigError
from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.generation import Generation
from pdmesh.ranks.place import RankPlace
from pdmesh.ranks.process import RankProcess


@dataclass(frozen=True, slots=True)
class Listeners:
    """Sockets that listen at node 0 for rank 0, which inherits them; open until `close`."""

    store: socket.socket
    step: socket.socket | None

    @classmethod
    def open(cls, address: str, nnodes: int) -> "Listeners":
        """At free ports of `address`, an IP address of this machine. Raises ConfigError where there are none."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.ExitStack() as opened:
            try:
                store = opened.enter_context(socket.create_server((address, 0), family=family))
                step = socket.create_server((address, 0), family=family) if nnodes > 1 else None
            except OSError as error:
                raise ConfigError(f"cannot listen on {address} for the ranks: {error.strerror}") from error
            opened.pop_all()
        return cls(store, step)

    @property
    def store_port(self) -> int:
        return int(self.store.getsockname()[1])

    @property
    def step_port(self) -> int:
        return int(self.step.getsockname()[1]) if self.step is not None else 0

    def close(self) -> None:
        self.store.close()
        if self.step is not None:
            self.step.close()


def start_ranks(
    command: Sequence[str],
    name: str,
    config: GroupConfig,
    generation: Generation,
    host: str,
    listeners: Listeners | None,
) -> list[RankProcess]:
    """This node's ranks, in order. Raises ConfigError, having ended those begun, where the system gives no more.

    Args:
        command: Every rank's command line.
        name: The service's, to tell its memory from others' in /proc.
        config: The group's.
        generation: What all nodes were told.
        host: This node's address as the others reach it.
        listeners: Rank 0's; None on other nodes than node 0.
    """
    started: list[RankProcess] = []
    with contextlib.ExitStack() as inherited:
        memory_fds = {use: _memory(inherited, f"pdmesh-{name}-{use}") for use in ("kv", "group")}
        step_fds = _step_sockets(inherited, config.local_ranks)
        try:
            for rank in config.local_ranks:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.setblocking(False)
                inherited.enter_context(theirs)
                leads = listeners if rank == 0 else None
                place = RankPlace(
                    rank=rank,
                    size=config.size,
                    node_rank=config.node_rank,
                    nnodes=config.nnodes,
                    local_size=config.local_size,
                    generation=generation.number,
                    host=host,
                    leader_host=generation.leader_host,
                    store_port=generation.store_port,
                    store_fd=leads.store.fileno() if leads else None,
                    step_port=generation.step_port,
                    step_fd=leads.step.fileno() if leads and leads.step else None,
                    token=generation.token,
                    control_fd=theirs.fileno(),
                    step_fds=step_fds[rank],
                    memory_fds=memory_fds,
                )
                started.append(_started(place, command, ours))
        except OSError as error:
            for process in started:
                process.end()
            raise ConfigError(
                f"cannot start rank {len(started) + config.local_ranks[0]} ({error.strerror}): raise this user's "
                "limits (ulimit -n, ulimit -u)"
            ) from error
    return started


def _started(place: RankPlace, command: Sequence[str], control: socket.socket) -> RankProcess:
    try:
        return RankProcess(place, command, control)
    except OSError:
        control.close()
        raise


def _memory(inherited: contextlib.ExitStack, name: str) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    inherited.callback(os.close, fd)
    return fd


def _step_sockets(inherited: contextlib.ExitStack, ranks: range) -> dict[int, dict[int, int]]:
    """`RankPlace.step_fds` of each rank of this node."""
    ends: dict[int, dict[int, int]] = {rank: {} for rank in ranks}
    if 0 in ends:
        for follower in ranks[1:]:
            leader_end, follower_end = (inherited.enter_context(end) for end in socket.socketpair())
            ends[0][follower] = leader_end.fileno()
            ends[follower] = {0: follower_end.fileno()}
    return ends
