"""The values of a group of ranks, and a rank's line to its supervisor."""

import json
import queue
import socket
from typing import Any

import pytest

from pdmesh.config import parse
from pdmesh.errors import ConfigError
from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.control import MAX_MESSAGE_CHARS, RankControl
from pdmesh.ranks.generation import Backoff
from pdmesh.ranks.hello import Hello, command_digest
from pdmesh.ranks.place import ENV_NAME, RankPlace

PLACE = RankPlace(
    rank=0, size=4, node_rank=0, nnodes=2, local_size=2, generation=3, host="10.0.0.1", leader_host="10.0.0.1",
    store_port=5000, store_fd=3, step_port=5001, step_fd=4, token="secret", control_fd=5, step_fds={1: 6},
    memory_fds={"kv": 7, "group": 8},
)  # fmt: skip


def test_ranks_are_spread_over_nodes_in_order() -> None:
    flags = ["--tp", "2", "--pp", "3", "--nnodes", "3", "--rendezvous", "10.0.0.1:29400"]
    nodes = [
        parse(GroupConfig, [*flags, "--node-rank", str(node_rank)], prog="p", description="d") for node_rank in range(3)
    ]
    assert [list(node.local_ranks) for node in nodes] == [[0, 1], [2, 3], [4, 5]]
    assert (nodes[0].size, nodes[0].local_size) == (6, 2)
    assert (nodes[0].leader_host, nodes[0].rendezvous_port) == ("10.0.0.1", 29400)


def test_an_ipv6_rendezvous_is_written_in_brackets() -> None:
    config = GroupConfig(tp=2, nnodes=2, rendezvous="[fd00::1]:29400")
    assert (config.leader_host, config.rendezvous_port) == ("fd00::1", 29400)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tp": 0}, "--tp is 0: must be at least 1"),
        ({"pp": -1}, "--pp is -1: must be at least 1"),
        ({"nnodes": 0}, "--nnodes is 0: must be at least 1"),
        ({"node_rank": 1}, r"--node-rank is 1: must lie in \[0, 1\)"),
        ({"tp": 3, "nnodes": 2}, "--nnodes is 2: must divide the 3 ranks"),
        ({"rendezvous": "h:1"}, "--rendezvous joins several nodes: give --nnodes too"),
        ({"tp": 2, "nnodes": 2}, "say with --rendezvous host:port"),
        ({"tp": 2, "nnodes": 2, "rendezvous": "host"}, "write host:port"),
        ({"tp": 2, "nnodes": 2, "rendezvous": ":29400"}, "write host:port"),
        ({"tp": 2, "nnodes": 2, "rendezvous": "host:70000"}, "write host:port"),
        ({"tp": 2, "nnodes": 2, "rendezvous": "0.0.0.0:29400"}, "not every address"),
        ({"tp": 2, "nnodes": 2, "rendezvous": "[::]:29400"}, "not every address"),
    ],
)
def test_what_makes_no_group_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GroupConfig(**options)


def test_a_place_crosses_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_NAME, raising=False)
    assert RankPlace.from_environment() is None
    assert RankPlace.from_json(PLACE.to_json()) == PLACE
    assert sorted(PLACE.descriptors) == [3, 4, 5, 6, 7, 8]


def test_what_a_rank_starts_does_not_inherit_its_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as inherited:
        inherited.set_inheritable(True)
        fd = inherited.fileno()
        facts = {**json.loads(PLACE.to_json()), "store_fd": None, "step_fd": None, "control_fd": fd}
        monkeypatch.setenv(ENV_NAME, json.dumps({**facts, "step_fds": {}, "memory_fds": {}}))
        place = RankPlace.from_environment()
        assert place is not None
        assert place.control_fd == fd
        assert not inherited.get_inheritable()


@pytest.mark.parametrize("text", ["", "3", "[]", "{}", '{"step_fds": {}}', '{"step_fds": {"x": 1}}'])
def test_a_damaged_place_says_who_sets_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(ENV_NAME, text)
    with pytest.raises(ConfigError, match="only the supervisor of a group of ranks sets it"):
        RankPlace.from_environment()


def test_a_place_of_descriptors_that_were_not_inherited_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        fd = closed.fileno()
    monkeypatch.setenv(ENV_NAME, PLACE.to_json().replace('"control_fd": 5', f'"control_fd": {fd + 1000}'))
    with pytest.raises(ConfigError, match="did not inherit"):
        RankPlace.from_environment()


def control_pair() -> tuple[socket.socket, RankControl, "queue.Queue[str]"]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(5)
    reasons: queue.Queue[str] = queue.Queue()
    return ours, RankControl(theirs.detach(), reasons.put), reasons


def test_a_rank_tells_and_is_told() -> None:
    supervisor, control, reasons = control_pair()
    with supervisor:
        control.ready()
        control.failed("x" * (MAX_MESSAGE_CHARS + 1), fatal=True)
        assert json.loads(supervisor.recv(65536)) == {"ready": True}
        assert json.loads(supervisor.recv(65536)) == {"failed": "x" * MAX_MESSAGE_CHARS, "fatal": True}
        supervisor.send(json.dumps({"down": "rank 1 is gone"}).encode())
        assert reasons.get(timeout=5) == "rank 1 is gone"
        # It told all there is: its end of the socket is closed, and no second reason comes.
        assert supervisor.recv(65536) == b""
    assert reasons.empty()
    control.failed("nobody listens any more", fatal=False)


def test_a_rank_learns_that_its_supervisor_is_gone() -> None:
    supervisor, _, reasons = control_pair()
    supervisor.close()
    assert reasons.get(timeout=5) == "the supervisor of its ranks is gone"


def test_delays_double_until_a_generation_was_steady() -> None:
    backoff = Backoff()
    assert [backoff.after(served_s) for served_s in (0, 59, 0, 0, 0, 0, 0, 0)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [backoff.after(served_s) for served_s in (61, 0, 0)] == [0, 0.5, 1]


def test_nodes_may_differ_in_what_is_their_own() -> None:
    shared = command_digest(["/bin/python", "-m", "decode", "model", "--tp", "2"])
    assert shared == command_digest(
        ["/opt/python3", "-m", "decode", "--node-rank", "1", "model", "--host=::", "--tp", "2", "--advertise", "b"]
    )
    assert shared != command_digest(["/bin/python", "-m", "decode", "model", "--tp", "4"])
    assert shared != command_digest(["/bin/python", "-m", "decode", "other", "--tp", "2"])


@pytest.mark.parametrize("changed", [{"protocol": 2}, {"hello": []}, {"hello": {}}, {"hello": {"tp": 1}}])
def test_another_version_of_the_program_is_told_so(changed: dict[str, Any]) -> None:
    hello = Hello(node_rank=1, nnodes=2, tp=2, pp=1, digest="d")
    assert Hello.from_message(hello.to_message()) == hello
    with pytest.raises(ConfigError, match="install the same on every node"):
        Hello.from_message({**hello.to_message(), **changed})


def test_a_number_that_is_no_other_nodes_is_refused() -> None:
    leader, other = (Hello(node_rank=node_rank, nnodes=2, tp=2, pp=1, digest="d") for node_rank in (0, 0))
    with pytest.raises(ConfigError, match=r"--node-rank is 0: must lie in \[1, 2\) to join node 0"):
        leader.check(other)
