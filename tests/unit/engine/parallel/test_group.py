"""The sockets between a leader and the followers of other nodes: who gets one, and that giving up ends all of them."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import pytest

from engine.parallel import group
from engine.parallel.exchange import GroupDownError
from engine.parallel.group import RankGroup
from engine.parallel.wire import Serve, Wire
from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.place import RankPlace

HOST = "127.0.0.1"
PATIENCE_S = 5.0
T = TypeVar("T")


def config(node_rank: int) -> GroupConfig:
    return GroupConfig(tp=2, nnodes=2, node_rank=node_rank, rendezvous=f"{HOST}:1")


@pytest.fixture
def leader() -> Iterator[RankGroup]:
    listener = socket.create_server((HOST, 0))
    port = int(listener.getsockname()[1])
    place = RankPlace(
        rank=0, size=2, node_rank=0, nnodes=2, local_size=1, generation=0, host=HOST, leader_host=HOST, store_port=0,
        store_fd=None, step_port=port, step_fd=listener.detach(), token="secret", control_fd=-1, step_fds={},
        memory_fds={},
    )  # fmt: skip
    made = RankGroup(config(0), place)
    yield made
    made.close()


@pytest.fixture
def follower(leader: RankGroup) -> Iterator[RankGroup]:
    made = RankGroup(config(1), replace(leader.place, rank=1, node_rank=1, step_fd=None))
    yield made
    made.close()


def started(work: Callable[[], T]) -> "Future[T]":
    """On a thread of its own, begun and most likely waiting."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    time.sleep(0.1)
    return result


def joined(leader: RankGroup, follower: RankGroup) -> tuple[Wire, Wire]:
    joining = started(leader.to_followers)
    to_leader = follower.to_leader()
    (to_follower,) = joining.result(PATIENCE_S)
    return to_follower, to_leader


def test_a_follower_of_another_node_is_found_by_its_token(leader: RankGroup, follower: RankGroup) -> None:
    joining = started(leader.to_followers)
    for greeting in (b"\n", b"guess 1\n", b"secret 0\n", b"secret 2\n", b"x" * 300):
        with socket.create_connection((HOST, leader.place.step_port), timeout=PATIENCE_S) as stranger:
            stranger.sendall(greeting)
            assert not _received(stranger)
    assert not joining.done()
    to_leader = follower.to_leader()
    (to_follower,) = joining.result(PATIENCE_S)
    to_follower.send(Serve(7, 64))
    assert to_leader.receive() == Serve(7, 64)


def test_who_says_its_name_slowly_keeps_nobody_waiting(
    leader: RankGroup, follower: RankGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "_HELLO_TIMEOUT_S", 0.3)
    joining = started(leader.to_followers)
    with socket.create_connection((HOST, leader.place.step_port), timeout=PATIENCE_S) as stranger:
        begun = time.monotonic()
        follower.to_leader()
        while not joining.done():
            assert time.monotonic() - begun < 1.0
            with contextlib.suppress(ConnectionError):
                stranger.sendall(b"x")
            time.sleep(0.05)


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1)
    except ConnectionResetError:
        return b""


def test_giving_up_ends_the_wait_for_followers(leader: RankGroup) -> None:
    joining = started(leader.to_followers)
    leader.give_up("node 1 is lost")
    with pytest.raises(GroupDownError, match="node 1 is lost"):
        joining.result(PATIENCE_S)


@pytest.mark.parametrize("side", ["leader", "follower"])
def test_giving_up_ends_the_wait_for_a_message_of_another_node(
    leader: RankGroup, follower: RankGroup, side: str
) -> None:
    to_follower, to_leader = joined(leader, follower)
    ours, wire = (leader, to_follower) if side == "leader" else (follower, to_leader)
    receiving = started(wire.receive)
    assert not receiving.done()
    ours.give_up("the other node is lost")
    # It reads as the other's end: the engine knows better by then.
    assert receiving.result(PATIENCE_S) is None
