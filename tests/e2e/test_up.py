"""`pdmesh up` as a person runs it: real processes, signals, and nothing left after."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pdmesh import Client
from pdmesh.errors import UnavailableError

pytestmark = pytest.mark.e2e

PDMESH = (sys.executable, "-m", "pdmesh.cli.main")
_END_TIMEOUT_S = 30


@dataclass
class Up:
    """A running `pdmesh up`, which prints to a pipe."""

    process: subprocess.Popen[str]
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def lines_until(self, text: str) -> list[str]:
        """What it prints up to a line that holds `text`."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if text in line:
                return lines
        raise AssertionError(f"it ended without saying {text!r}:\n{''.join(lines)}")

    def family(self) -> list[psutil.Process]:
        """All processes that it started."""
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def up(model: Path, port: int, environment: dict[str, str], *flags: str) -> Iterator[Up]:
    command = [*PDMESH, "up", str(model), "--port", str(port), *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            yield Up(process, port)
        finally:
            # With it goes its family, or a test would have failed.
            process.kill()


def assert_gone(processes: list[psutil.Process]) -> None:
    assert processes, "there was somebody to end"
    _, alive = psutil.wait_procs(processes, timeout=_END_TIMEOUT_S)
    assert [process.cmdline() for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_it_serves_mends_itself_and_leaves_nothing(
    tiny_model: Path, unused_tcp_port: int, environment: dict[str, str]
) -> None:
    with up(tiny_model, unused_tcp_port, environment) as running:
        screen = "".join(running.lines_until("Ctrl-C"))
        for word in ("prefill-0", "decode-0", "router", "valkey", "KV blocks", f"--address {running.address}"):
            assert word in screen
        family = running.family()

        command = [*PDMESH, "generate", "a b", "--max-tokens", "4", "--json", "--address", running.address]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert '"completion_tokens": 4' in done.stdout

        with Client(running.address) as client:
            (decode,) = [view.info for view in client.workers() if view.info.worker_id == "decode-0"]
            victim = next(process for process in family if "decode-0" in process.cmdline())
            victim.kill()
            running.lines_until("decode-0 was ended by SIGKILL; starting it again")
            assert _generates_again(client, decode.incarnation)
        family = running.family()

        running.process.send_signal(signal.SIGINT)
        running.lines_until("Stopping")
        assert running.process.wait(_END_TIMEOUT_S) == 0
        assert_gone(family)


def test_stores_and_tiers_show_what_they_keep(
    tiny_model: Path, tmp_path: Path, unused_tcp_port: int, environment: dict[str, str]
) -> None:
    flags = ("--stores", "1", "--store-host-gib", "0.01", "--kv-host-gib", "0.01", "--kv-disk-gib", "0.02")
    with up(tiny_model, unused_tcp_port, environment, *flags, "--kv-disk-dir", str(tmp_path / "kv")) as running:
        screen = "".join(running.lines_until("Ctrl-C"))
        for word in ("store-0", "0.01 GiB memory, 0.02 GiB disk"):
            assert word in screen
        family = running.family()
        with Client(running.address) as client:
            client.generate(tokens=[1 + i % 200 for i in range(200)], max_tokens=2)
            assert _held_by_store(client) == 200 // 16
            command = [*PDMESH, "status", "--address", running.address]
            status = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            assert "12 in memory" in status
        assert {path.name for path in (tmp_path / "kv").iterdir()} == {"prefill-0", "decode-0"}
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(_END_TIMEOUT_S) == 0
        assert_gone(family)


@pytest.mark.slow
def test_workers_of_several_ranks_mend_themselves(
    tiny_model: Path, unused_tcp_port: int, environment: dict[str, str]
) -> None:
    with up(tiny_model, unused_tcp_port, environment, "--decode-tp", "2", "--prefill-pp", "2") as running:
        screen = "".join(running.lines_until("Ctrl-C"))
        for word in ("decode TP 2", "prefill PP 2", "2 × "):
            assert word in screen
        family = running.family()

        with Client(running.address) as client:
            tokens = client.generate("a b", max_tokens=4, temperature=0).token_ids
            decode, _ = before = [client.worker_status(worker_id) for worker_id in ("decode-0", "prefill-0")]
            assert [[rank.rank for rank in status.ranks] for status in before] == [[0, 1]] * 2
            # A rank, which its supervisor mends, so that to `pdmesh up` nothing has happened; and a supervisor, which
            # `pdmesh up` starts again.
            psutil.Process(decode.ranks[1].pid).kill()
            next(process for process in family if "prefill-0" in process.cmdline()).kill()
            assert "decode-0" not in "".join(running.lines_until("prefill-0 was ended by SIGKILL; starting it again"))
            for status in before:
                assert _generates_again(client, status.info.incarnation, status.info.worker_id)
                after = client.worker_status(status.info.worker_id)
                assert not {rank.pid for rank in status.ranks} & {rank.pid for rank in after.ranks}
                assert after.ranks[1].weight_bytes == status.ranks[1].weight_bytes > 0
            assert client.generate("a b", max_tokens=4, temperature=0).token_ids == tokens
        family += running.family()

        running.process.send_signal(signal.SIGINT)
        running.lines_until("Stopping")
        assert running.process.wait(_END_TIMEOUT_S) == 0
        assert_gone(family)


def test_a_degree_that_the_model_does_not_allow_is_quoted_from_the_worker(
    tiny_model: Path, unused_tcp_port: int, environment: dict[str, str]
) -> None:
    with up(tiny_model, unused_tcp_port, environment, "--decode-tp", "3") as running:
        output, _ = running.process.communicate(timeout=60)
        assert running.process.returncode == 2
    # Any of them may be the first to find it.
    assert re.search(r"decode-0 could not start: rank \d: --tp is 3: ", output)
    assert "use 1, 2 or 4\n" in output
    assert "Traceback" not in output


def _held_by_store(client: Client) -> int:
    """Blocks that the store has, once it has any."""
    for _ in range(100):
        loads = [view.info.load for view in client.workers() if view.info.worker_id == "store-0"]
        if loads and loads[0].num_host_blocks:
            return loads[0].num_host_blocks
        time.sleep(0.1)
    return 0


def _generates_again(client: Client, old_incarnation: str, worker_id: str = "decode-0") -> bool:
    """Whether this worker's successor is ready and a request is answered, in the time that its start may take."""
    for _ in range(600):
        views = [view for view in client.workers() if view.info.worker_id == worker_id]
        if views and views[0].info.incarnation != old_incarnation and not views[0].excluded_because:
            with contextlib.suppress(UnavailableError):
                return bool(client.generate("a b", max_tokens=2, ignore_eos=True).token_ids)
        time.sleep(0.1)
    return False


def test_sigkill_of_it_leaves_nothing(tiny_model: Path, unused_tcp_port: int, environment: dict[str, str]) -> None:
    with up(tiny_model, unused_tcp_port, environment, "--prefill", "2") as running:
        running.lines_until("Ctrl-C")
        family = running.family()
        assert len(family) == 5
        running.process.kill()
        running.process.wait()
        assert_gone(family)


def test_sigterm_while_it_starts_leaves_nothing(
    tiny_model: Path, unused_tcp_port: int, environment: dict[str, str]
) -> None:
    with up(tiny_model, unused_tcp_port, environment) as running:
        running.lines_until("decode-0: starting")
        family = running.family()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(_END_TIMEOUT_S) == 130
        assert_gone(family)


def test_a_worker_that_cannot_start_ends_it_and_is_quoted(
    tmp_path: Path, unused_tcp_port: int, environment: dict[str, str]
) -> None:
    model = tmp_path / "empty"
    model.mkdir()
    with up(model, unused_tcp_port, environment) as running:
        output, _ = running.process.communicate(timeout=60)
        assert running.process.returncode == 2
    assert "could not start: " in output
    assert "its log: " in output
    assert "Traceback" not in output


def test_a_taken_port_is_one_line(tiny_model: Path, environment: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with up(tiny_model, taken.getsockname()[1], environment) as running:
            output, _ = running.process.communicate(timeout=60)
            assert running.process.returncode == 2
    (line,) = output.splitlines()
    assert "choose another port" in line
