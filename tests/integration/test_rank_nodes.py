"""A group over two nodes: two supervisors that find each other, lose each other, and start again together."""

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pdmesh.ranks.config import GroupConfig
from tests.rank_group import Node, is_alive, num_zombies, until

# Silence is noticed after 1.25 s, and all are down 0.7 s later; a busy machine is given some more.
DOWN_S = 2.0
SILENT_DOWN_S = 3.5


def node_config(node_rank: int, port: int) -> GroupConfig:
    return GroupConfig(tp=2, pp=2, nnodes=2, node_rank=node_rank, rendezvous=f"127.0.0.2:{port}")


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.2", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving_nodes(directory: Path, port: int, *misdeed: object) -> Iterator[tuple[Node, Node]]:
    with (
        Node(node_config(0, port), directory, *misdeed) as leader,
        Node(node_config(1, port), directory, *misdeed) as follower,
    ):
        leader.ready(0)
        yield leader, follower


def test_the_ranks_of_both_nodes_are_one_group(tmp_path: Path, port: int) -> None:
    with serving_nodes(tmp_path, port) as (leader, follower):
        places = [leader.place(0, rank) for rank in range(4)]
        assert [place["node_rank"] for place in places] == [0, 0, 1, 1]
        assert [place["step_fds"].keys() for place in places] == [{"1"}, {"0"}, set(), set()]
        for place in places:
            assert (place["size"], place["local_size"], place["nnodes"]) == (4, 2, 2)
            assert place["leader_host"] == "127.0.0.2"
            for shared in ("token", "store_port", "step_port"):
                assert place[shared] == places[0][shared]
        assert [place["host"] for place in places[:2]] == ["127.0.0.2"] * 2
        assert [place["host"] for place in places[2:]] == ["127.0.0.1"] * 2
        follower.signal(signal.SIGTERM)
        assert (leader.exit_code(), follower.exit_code()) == (0, 0)
        assert leader.said(0, "asked") == "SIGTERM"
        assert (tmp_path / "0-drained").exists()
        leader.assert_gone(0, 1.0)
        follower.assert_gone(0, 1.0)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_rank_that_ends_takes_both_nodes_down_and_both_start_again(tmp_path: Path, port: int, rank: int) -> None:
    with serving_nodes(tmp_path, port) as (leader, follower):
        num_fds = [node.num_fds() for node in (leader, follower)]
        victim = leader.rank(0, rank)
        os.kill(victim, signal.SIGKILL)
        begun = time.monotonic()
        leader.assert_gone(0, DOWN_S)
        follower.assert_gone(0, DOWN_S - (time.monotonic() - begun))
        leader.ready(1)
        assert f"rank {rank} (pid {victim}) was ended by SIGKILL" in leader.log
        assert leader.place(1, 3)["token"] == leader.place(1, 0)["token"] != leader.place(0, 0)["token"]
        assert [node.num_fds() for node in (leader, follower)] == num_fds
        assert [num_zombies(node.process.pid) for node in (leader, follower)] == [0, 0]


def test_a_node_that_is_killed_takes_the_other_down_until_it_is_back(tmp_path: Path, port: int) -> None:
    with serving_nodes(tmp_path, port) as (leader, follower):
        follower.signal(signal.SIGKILL)
        follower.exit_code()
        leader.assert_gone(0, DOWN_S)
        until(lambda: not any(is_alive(follower.rank(0, rank)) for rank in (2, 3)), "its ranks died with it", 1.0)
        until(lambda: leader.log.count("waiting at") > 1, "node 0 waits for node 1")
        # Closed, or reset where it was killed before it read all that it was sent.
        assert re.match(
            r"node 1 \(127\.0\.0\.1\) is lost: the connection (was closed|broke: .*[Rr]eset)",
            leader.said(0, "down-0") or "",
        )
        with Node(node_config(1, port), tmp_path, note="-again"):
            leader.ready(1)


def test_node_0_that_is_killed_takes_the_other_down_until_it_is_back(tmp_path: Path, port: int) -> None:
    with serving_nodes(tmp_path, port) as (leader, follower):
        leader.signal(signal.SIGKILL)
        leader.exit_code()
        follower.assert_gone(0, DOWN_S)
        until(lambda: "waiting for node 0 at" in follower.log.partition("is lost")[2], "node 1 waits for node 0")
        leader.forget()
        (tmp_path / "0-ready").unlink()
        with Node(node_config(0, port), tmp_path, note="-again") as again:
            again.ready(0)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_node_that_falls_silent_is_lost_until_it_speaks_again(tmp_path: Path, port: int, silent: int) -> None:
    with serving_nodes(tmp_path, port) as nodes:
        nodes[silent].signal(signal.SIGSTOP)
        other = nodes[1 - silent]
        assert until(lambda: other.is_gone(0), "the other node's ranks gone", SILENT_DOWN_S) > 0.9
        until(lambda: "silent for 1.25 s" in other.log, "it says why", 1.0)
        nodes[silent].signal(signal.SIGCONT)
        nodes[0].ready(1)
        nodes[silent].assert_gone(0, 1.0)


def test_a_whole_group_told_to_stop_is_asked_to_drain_once(tmp_path: Path, port: int) -> None:
    with serving_nodes(tmp_path, port) as nodes:
        for node in nodes:
            node.signal(signal.SIGTERM)
        assert [node.exit_code() for node in nodes] == [0, 0]
        assert (tmp_path / "0-drained").exists()
        assert not (tmp_path / "0-asked-again").exists()


def test_who_insists_on_another_node_is_heard_again(tmp_path: Path, port: int) -> None:
    with serving_nodes(tmp_path, port) as (leader, follower):
        follower.signal(signal.SIGTERM)
        until(lambda: leader.said(0, "asked") is not None, "rank 0 was asked")
        follower.signal(signal.SIGTERM)
        assert (leader.exit_code(), follower.exit_code()) == (0, 0)
        assert leader.said(0, "asked-again") == "SIGTERM"


@pytest.mark.parametrize("node_rank", [0, 1])
def test_a_node_that_waits_can_be_stopped(tmp_path: Path, port: int, node_rank: int) -> None:
    with Node(node_config(node_rank, port), tmp_path) as node:
        until(lambda: "waiting" in node.log, "it waits")
        node.signal(signal.SIGTERM)
        assert node.exit_code(2.0) == 0


def test_what_a_person_must_mend_ends_both_nodes_and_each_says_it_once(tmp_path: Path, port: int) -> None:
    misdeed = (3, 0, "fatal")
    with (
        Node(node_config(0, port), tmp_path, *misdeed) as leader,
        Node(node_config(1, port), tmp_path, *misdeed) as follower,
    ):
        assert (leader.exit_code(), follower.exit_code()) == (2, 2)
        assert leader.log.splitlines()[-1] == "pdmesh: node 1 (127.0.0.1): rank 3: no such model"
        assert follower.log.count("no such model") == 1
        assert leader.said(1, "rank-0") is None


def test_a_group_that_never_served_is_not_started_again_on_any_node(tmp_path: Path, port: int) -> None:
    misdeed = (3, 0, "exit")
    with (
        Node(node_config(0, port), tmp_path, *misdeed) as leader,
        Node(node_config(1, port), tmp_path, *misdeed) as follower,
    ):
        assert (leader.exit_code(), follower.exit_code()) == (3, 3)
        assert leader.said(1, "rank-0") is None


def test_a_node_that_does_not_fit_is_refused_and_disturbs_nobody(tmp_path: Path, port: int) -> None:
    config = node_config(1, port)
    with serving_nodes(tmp_path, port) as (leader, follower):
        others = {
            "was started with --tp 4 --pp 1 --nnodes 2, node 0 with --tp 2 --pp 2": (replace(config, tp=4, pp=1), ()),
            "command line is not node 0's": (config, (0, 0, "deaf")),
            "--node-rank 1 is taken by node 1 (127.0.0.1)": (config, ()),
        }
        for number, (words, (other, misdeed)) in enumerate(others.items()):
            with Node(other, tmp_path, *misdeed, note=f"-{number}") as refused:
                assert refused.exit_code() == 2
                assert words in refused.log.splitlines()[-1]
                assert refused.log.splitlines()[-1].startswith("pdmesh: ")
            assert words in leader.log
        for garbage in (
            b"{}\n",
            b"[" * 10_000 + b"\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"[]\n",
            b"{" * 20_000,
            b'{"stop": 1}\n',
            b'{"hello": {}}\n',
        ):
            with socket.create_connection(("127.0.0.2", port), timeout=5) as stranger:
                stranger.sendall(garbage)
                with contextlib.suppress(ConnectionResetError):
                    while stranger.recv(4096):
                        pass
        assert is_alive(leader.rank(0, 0))
        assert is_alive(follower.rank(0, 3))
        assert leader.said(1, "rank-0") is None


def test_a_rendezvous_that_is_not_this_machines_says_so(tmp_path: Path) -> None:
    with Node(replace(node_config(0, 1), rendezvous="192.0.2.1:29400"), tmp_path) as node:
        assert node.exit_code() == 2
        assert node.log.startswith("pdmesh: node 0 cannot listen at --rendezvous 192.0.2.1:29400")
