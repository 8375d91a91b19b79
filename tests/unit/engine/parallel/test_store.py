"""The store of a group's addresses: what one rank sets, all get; who does not show the token gets nothing."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from torch.distributed.distributed_c10d import PrefixStore

from engine.parallel.store import FollowerStore, LeaderStore

TOKEN = "token"
HOST = "127.0.0.1"
PATIENCE_S = 10.0

_LEAD = """
import socket, sys, threading
from engine.parallel.store import LeaderStore
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
store = LeaderStore(listener, "token")
threading.Event().wait()
"""


@pytest.fixture
def port() -> Iterator[int]:
    """Of a leader in this process."""
    listener = socket.create_server((HOST, 0))
    number = int(listener.getsockname()[1])
    leader = LeaderStore(listener, TOKEN)
    leader.set("of the leader", b"\0\xff")
    yield number
    # The thread that accepts is in the middle of it: closing alone would not wake it.
    listener.shutdown(socket.SHUT_RDWR)


def follower(port: int, token: str = TOKEN) -> FollowerStore:
    return FollowerStore(HOST, port, token)


def started(work: Callable[[], object]) -> "Future[object]":
    """On a thread of its own, begun and most likely waiting."""
    result: Future[object] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    time.sleep(0.1)
    return result


def test_what_one_sets_all_get(port: int) -> None:
    # Torch holds on to a store without Python's knowing.
    stores = [follower(port) for _ in range(3)]
    one, other, apart = (
        PrefixStore(name, store) for name, store in zip(("group", "group", "stage"), stores, strict=True)
    )
    value = "tökén" * 5000
    one.set("address", value)
    assert other.get("address") == value.encode()
    assert other.check(["address"])
    assert not other.check(["address", "another"])
    assert not apart.check(["address"])
    assert follower(port).get("of the leader") == b"\0\xff"


def test_who_asks_too_early_waits(port: int) -> None:
    getting = started(lambda: follower(port).get("late"))
    waiting = started(lambda: follower(port).wait(["late", "later"]))
    follower(port).set("late", b"1")
    assert getting.result(PATIENCE_S) == b"1"
    time.sleep(0.1)
    assert not waiting.done()
    follower(port).set("later", b"2")
    waiting.result(PATIENCE_S)


def test_one_thread_waits_for_what_another_of_the_same_rank_sets(port: int) -> None:
    store = follower(port)
    getting = started(lambda: store.get("own"))
    assert not getting.done()
    setting = started(lambda: store.set("own", b"1"))
    setting.result(PATIENCE_S)
    assert getting.result(PATIENCE_S) == b"1"


@pytest.mark.parametrize("token", ["", "tok", "tokens", "tökén"])
def test_who_does_not_know_the_token_learns_and_changes_nothing(port: int, token: str) -> None:
    stranger = follower(port, token)
    with pytest.raises(RuntimeError):
        stranger.get("of the leader")
    with pytest.raises(RuntimeError):
        stranger.set("of the leader", b"theirs")
    assert follower(port).get("of the leader") == b"\0\xff"


@pytest.mark.parametrize(
    "question",
    [b"", b"\n", b"{}", b"[]", b'{"do": "evaluate"}', b'{"do": "set", "key": "k"}', b"\xff" * 100, b"x" * (2 << 20)],
    ids=lambda question: repr(question[:30]),
)
def test_nonsense_is_not_answered_and_disturbs_nobody(port: int, question: bytes) -> None:
    with socket.create_connection((HOST, port), timeout=PATIENCE_S) as sock:
        sock.sendall(TOKEN.encode() + b"\n" + question + b"\n")
        with contextlib.suppress(ConnectionResetError):
            assert not sock.recv(1)
    assert follower(port).get("of the leader") == b"\0\xff"


def test_who_says_nothing_keeps_nobody_waiting(port: int) -> None:
    with socket.create_connection((HOST, port)):
        assert started(lambda: follower(port).get("of the leader")).result(1.0) == b"\0\xff"


def test_a_leader_that_is_gone_ends_what_waits_for_it() -> None:
    with subprocess.Popen([sys.executable, "-c", _LEAD], stdout=subprocess.PIPE) as leader:
        assert leader.stdout is not None
        port = json.loads(leader.stdout.readline())
        store = follower(port)
        store.set("there", b"1")
        getting = started(lambda: store.get("never"))
        assert not getting.done()
        leader.kill()
    with pytest.raises(RuntimeError, match="rank 0"):
        getting.result(PATIENCE_S)
    with pytest.raises(RuntimeError, match=f"rank 0 cannot be reached at {HOST}:{port}"):
        store.get("there")
