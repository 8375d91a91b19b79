"""What `--watch` does, in a pipe and on a terminal."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.text import Text

from pdmesh.cli import screens


def states(*values: str) -> Callable[[], str]:
    """Each value in turn, then Ctrl-C."""
    left = list(values)

    def fetch() -> str:
        if not left:
            raise KeyboardInterrupt
        return left.pop(0)

    return fetch


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screens, "_WATCH_S", 0.0)


def test_once() -> None:
    out = io.StringIO()
    screens.show(states("one", "two"), Text, Console(file=out), json=False, watch=False)
    assert out.getvalue() == "one\n"


def test_a_pipe_gets_one_state_after_the_other() -> None:
    out = io.StringIO()
    screens.show(states("one", "two"), Text, Console(file=out), json=False, watch=True)
    assert out.getvalue() == "one\ntwo\n"


def test_json_is_a_line_for_each_state(capsys: pytest.CaptureFixture[str]) -> None:
    screens.show(states("one", "two"), Text, Console(force_terminal=True), json=True, watch=True)
    assert capsys.readouterr().out == '"one"\n"two"\n'


def test_a_terminal_is_drawn_over() -> None:
    out = io.StringIO()
    screens.show(states("one", "two"), Text, Console(file=out, force_terminal=True), json=False, watch=True)
    erase_line = "\x1b[2K"
    assert out.getvalue().index("one") < out.getvalue().index(erase_line) < out.getvalue().index("two")
