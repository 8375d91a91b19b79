"""The ranks of one node: started, watched, taken down together, started again; real processes throughout."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from pdmesh.ranks.config import GroupConfig
from tests.rank_group import Node, is_alive, num_zombies, until

# A whole group is down within 1.5 s; a busy machine is given some more.
DOWN_S = 2.0


def test_every_rank_is_told_its_place_and_meets_the_others(tmp_path: Path) -> None:
    with Node(GroupConfig(tp=2, pp=2), tmp_path) as node:
        node.ready(0)
        places = [node.place(0, rank) for rank in range(4)]
        assert [place["rank"] for place in places] == [0, 1, 2, 3]
        for place in places:
            assert (place["size"], place["local_size"], place["nnodes"], place["generation"]) == (4, 4, 1, 0)
            assert place["host"] == place["leader_host"] == "127.0.0.1"
            assert place["store_port"] == places[0]["store_port"] > 0
            assert place["memory_fds"].keys() == {"kv", "group"}
            assert (place["step_port"], place["step_fd"]) == (0, None)
            assert place["token"] == places[0]["token"]
        assert places[0]["step_fds"].keys() == {"1", "2", "3"}
        assert [place["step_fds"].keys() for place in places[1:]] == [{"0"}] * 3


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("number", "end"),
    [
        (signal.SIGKILL, "was ended by SIGKILL"),
        (signal.SIGSTOP, "was stopped by a signal"),
        (signal.SIGUSR1, "ended with exit code 3"),
    ],
)
def test_a_rank_that_ends_or_stands_still_takes_all_down_and_all_start_again(
    tmp_path: Path, rank: int, number: signal.Signals, end: str
) -> None:
    with Node(GroupConfig(tp=3), tmp_path) as node:
        node.ready(0)
        victim = node.rank(0, rank)
        os.kill(victim, number)
        node.assert_gone(0, DOWN_S)
        node.ready(1)
        reason = f"rank {rank} (pid {victim}) {end}"
        assert f"{reason}; starting all ranks again in 0.5 s" in node.log
        assert node.said(0, "down-0") == (reason if rank else None)
        assert node.place(0, 0)["token"] != node.place(1, 0)["token"]


def test_a_leader_that_does_not_heed_the_end_is_killed(tmp_path: Path) -> None:
    with Node(GroupConfig(tp=2), tmp_path, 0, 0, "deaf") as node:
        node.ready(0)
        os.kill(node.rank(0, 1), signal.SIGKILL)
        assert until(lambda: node.is_gone(0), "all down", DOWN_S) > 0.5
        assert node.said(0, "down-0") is not None
        node.ready(1)


def test_a_follower_that_leaves_by_itself_takes_all_down(tmp_path: Path) -> None:
    with Node(GroupConfig(tp=2), tmp_path, 1, 0, "hasty") as node:
        node.ready(0)
        node.assert_gone(0, DOWN_S + 0.5)
        node.ready(1)
        assert "ended with exit code 0, and rank 0 did not" in node.log


def test_nothing_is_left_behind_over_generations(tmp_path: Path) -> None:
    with Node(GroupConfig(tp=3), tmp_path) as node:
        node.ready(0)
        num_fds = node.num_fds()
        for generation in range(3):
            os.kill(node.rank(generation, generation), signal.SIGKILL)
            node.ready(generation + 1)
            node.assert_gone(generation)
        assert node.num_fds() == num_fds
        assert num_zombies(node.process.pid) == 0
        assert len(psutil.Process(node.process.pid).children()) == 3


def test_delays_grow_while_generations_fail(tmp_path: Path) -> None:
    with Node(GroupConfig(tp=2), tmp_path, 1, 1, "exit") as node:
        node.ready(0)
        os.kill(node.rank(0, 1), signal.SIGKILL)
        node.ready(2)
        assert node.log.count("starting all ranks again in 0.5 s") == 1
        assert "ended with exit code 3; starting all ranks again in 1 s" in node.log


@pytest.mark.parametrize("standing_still", [False, True])
def test_the_supervisors_end_is_the_end_of_all(tmp_path: Path, standing_still: bool) -> None:
    with Node(GroupConfig(tp=3), tmp_path) as node:
        node.ready(0)
        if standing_still:
            node.signal(signal.SIGSTOP)
        node.signal(signal.SIGKILL)
        node.exit_code()
        pids = [node.rank(0, rank) for rank in range(3)]
        until(lambda: not any(map(is_alive, pids)), "all ranks gone", 1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_drains(tmp_path: Path, number: signal.Signals) -> None:
    with Node(GroupConfig(tp=3), tmp_path) as node:
        node.ready(0)
        node.signal(number)
        assert node.exit_code() == 0
        assert node.said(0, "asked") == number.name
        assert (tmp_path / "0-drained").exists()
        assert not (tmp_path / "0-asked-again").exists()
        node.assert_gone(0, 1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_they_start_needs_no_draining(tmp_path: Path, number: signal.Signals) -> None:
    with Node(GroupConfig(tp=2), tmp_path, 0, 0, "slow") as node:
        until(lambda: None not in (node.said(0, "rank-0"), node.said(0, "rank-1")), "both have started")
        node.signal(number)
        assert node.exit_code() == 0
        assert node.said(0, "asked") is None
        node.assert_gone(0, 1.0)


def test_who_insists_is_heard_again(tmp_path: Path) -> None:
    with Node(GroupConfig(tp=2), tmp_path) as node:
        node.ready(0)
        node.signal(signal.SIGTERM)
        until(lambda: node.said(0, "asked") is not None, "rank 0 was asked")
        node.signal(signal.SIGTERM)
        assert node.exit_code() == 0
        assert node.said(0, "asked-again") == "SIGTERM"


def test_a_stop_before_the_next_generation_needs_no_ranks(tmp_path: Path) -> None:
    with Node(GroupConfig(tp=2), tmp_path) as node:
        node.ready(0)
        os.kill(node.rank(0, 0), signal.SIGKILL)
        until(lambda: "starting all ranks again" in node.log, "the wait before the next start")
        node.signal(signal.SIGTERM)
        assert node.exit_code(5.0) == 0
        assert node.said(1, "rank-0") is None


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_person_must_mend_ends_the_group(tmp_path: Path, rank: int) -> None:
    with Node(GroupConfig(tp=2), tmp_path, rank, 0, "fatal") as node:
        assert node.exit_code() == 2
        assert node.log.count("no such model") == 1
        node.assert_gone(0, 1.0)
        assert node.said(1, "rank-0") is None


def test_what_a_person_must_mend_ends_a_later_generation_too(tmp_path: Path) -> None:
    with Node(GroupConfig(tp=2), tmp_path, 1, 1, "fatal") as node:
        node.ready(0)
        os.kill(node.rank(0, 1), signal.SIGKILL)
        assert node.exit_code() == 2
        assert node.log.count("no such model") == 1


@pytest.mark.parametrize(("misdeed", "exit_code"), [("exit", 3), ("broken", 1)])
def test_a_group_that_never_served_is_not_started_again(tmp_path: Path, misdeed: str, exit_code: int) -> None:
    with Node(GroupConfig(tp=2), tmp_path, 1, 0, misdeed) as node:
        assert node.exit_code() == exit_code
        node.assert_gone(0, 1.0)
        assert node.said(1, "rank-0") is None
