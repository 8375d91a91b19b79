"""Processes of a local cluster, with small real ones."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pdmesh.local.child import ChildProcess, ChildSpec, how_it_ended


def python(code: str, name: str = "child") -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-c", code), {"GREETING": "hello"})


async def ended(child: ChildProcess) -> int:
    await child.start()
    return await asyncio.wait_for(child.wait(), 20)


async def until_it_says(child: ChildProcess, word: str) -> str:
    """The first line of its log that begins with `word`."""
    for _ in range(1000):
        line = next((line for line in child.last_words() if line.startswith(word)), None)
        if line is not None:
            return line
        await asyncio.sleep(0.01)
    raise AssertionError(f"the child never said {word}: {child.last_words()}")


async def test_output_goes_to_its_log_and_the_exit_code_comes_back(tmp_path: Path) -> None:
    child = ChildProcess(python("import os, sys; print(os.environ['GREETING']); sys.exit(3)"), tmp_path)
    assert await ended(child) == 3
    assert child.log_path == tmp_path / "child.log"
    assert child.last_words() == ["hello"]
    assert not child.running


async def test_starting_again_adds_to_the_log(tmp_path: Path) -> None:
    child = ChildProcess(python("print('hello')"), tmp_path)
    assert await ended(child) == 0
    assert await ended(child) == 0
    assert child.last_words() == ["hello", "hello"]


async def test_last_words_are_for_a_person(tmp_path: Path) -> None:
    record = json.dumps({"level": "error", "message": "it broke", "exception": "Traceback: boom"})
    child = ChildProcess(ChildSpec("child", ("/bin/echo", f"plain\n\n{record}\n[1, 2]")), tmp_path)
    await ended(child)
    assert child.last_words() == ["plain", "error it broke Traceback: boom", "[1, 2]"]
    assert child.last_words(1) == ["[1, 2]"]


async def test_a_line_that_says_what_to_mend_stands_alone(tmp_path: Path) -> None:
    child = ChildProcess(ChildSpec("child", ("/bin/echo", "noise\npdmesh: no such model")), tmp_path)
    await ended(child)
    assert child.last_words() == ["no such model"]


async def test_stop_asks_first(tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('bye'))\n"
        "print('ready', flush=True)\nsignal.pause()"
    )
    child = ChildProcess(python(code), tmp_path)
    await child.start()
    await until_it_says(child, "ready")
    await child.stop(grace_s=20)
    assert child.last_words() == ["ready", "bye"]


async def test_stop_ends_who_does_not_listen(tmp_path: Path) -> None:
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\nsignal.pause()"
    child = ChildProcess(python(code), tmp_path)
    await child.start()
    await until_it_says(child, "ready")
    await child.stop(grace_s=0.01)
    assert await child.wait() == -signal.SIGKILL


async def test_what_a_child_started_does_not_outlive_it(tmp_path: Path) -> None:
    code = "import subprocess; print('pid', subprocess.Popen(['sleep', '600']).pid, flush=True)"
    child = ChildProcess(python(code), tmp_path)
    assert await ended(child) == 0
    assert_gone(int(child.last_words()[-1].split()[1]))


async def test_a_command_that_is_not_there_says_so(tmp_path: Path) -> None:
    child = ChildProcess(ChildSpec("child", ("/no/such/command",)), tmp_path)
    assert await ended(child) == 1
    assert child.last_words() == ["cannot run /no/such/command: No such file or directory"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_child_dies_with_its_parent_even_by_sigkill(tmp_path: Path) -> None:
    # The command itself tells its pid, by a pipe: by then nothing but PDEATHSIG can end it.
    told = tmp_path / "told"
    os.mkfifo(told)
    parent_code = (
        "import asyncio, pathlib\n"
        "from pdmesh.local.child import ChildProcess, ChildSpec\n"
        "async def main():\n"
        f"    spec = ChildSpec('child', ('/bin/sh', '-c', 'echo $$ > {told}; exec sleep 600'))\n"
        f"    child = ChildProcess(spec, pathlib.Path({str(tmp_path)!r}))\n"
        "    await child.start()\n"
        "    await child.wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent_code]) as parent:
        child_pid = int(told.read_text())
        assert psutil.pid_exists(child_pid)
        parent.kill()
    assert_gone(child_pid)


def test_a_child_whose_parent_is_gone_already_does_not_run() -> None:
    script = Path(__file__).parents[3] / "pdmesh" / "local" / "die_with_parent.py"
    # This process is the script's parent; it is told of another.
    command = [sys.executable, "-I", "-S", str(script), str(os.getppid()), "/bin/echo", "still here"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(
    ("exit_code", "words"), [(0, "ended with exit code 0"), (2, "ended with exit code 2"), (-9, "was ended by SIGKILL")]
)
def test_exit_codes_in_words(exit_code: int, words: str) -> None:
    assert how_it_ended(exit_code) == words


def assert_gone(pid: int) -> None:
    """It has ended; a zombie that nobody has reaped yet counts."""
    try:
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            process.wait(20)
    except psutil.NoSuchProcess:
        pass
