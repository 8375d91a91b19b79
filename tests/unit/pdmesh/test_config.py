"""Configuration from flags and environment."""

import socket
from dataclasses import dataclass

import pytest

from pdmesh.config import ServiceConfig, fail, option, parse
from pdmesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Inner:
    depth: int = option("how deep", default=1)
    fast: bool = option("or slow", default=False)
    hue: str | None = option("colour", default=None, choices=("red", "blue"))


@dataclass(frozen=True, slots=True)
class Outer:
    inner: Inner
    name: str = option("what it is called", positional=True)
    weight: float = option("how heavy", default=0.5)

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError("weight is negative")


def read(*argv: str) -> Outer:
    return parse(Outer, argv, prog="test", description="")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as raised:
        read(*argv)
    assert raised.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_ends_a_process_is_one_line_whatever_a_name_holds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail("tensor a\nb is missing")
    assert capsys.readouterr().err == "pdmesh: tensor a\\nb is missing\n"


def test_defaults() -> None:
    assert read("x") == Outer(Inner(depth=1, fast=False, hue=None), name="x", weight=0.5)


def test_flag_before_environment_before_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDMESH_DEPTH", "2")
    monkeypatch.setenv("PDMESH_WEIGHT", "1.5")
    assert read("x", "--depth", "3") == Outer(Inner(depth=3), name="x", weight=1.5)


def test_what_must_be_given_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "name" in refused(capsys)
    monkeypatch.setenv("PDMESH_NAME", "from afar")
    assert read().name == "from afar"
    assert read("from here").name == "from here"


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("ON", True), ("1", True), ("no", False), ("0", False)])
def test_booleans_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, expected: bool) -> None:
    monkeypatch.setenv("PDMESH_FAST", text)
    assert read("x").inner.fast is expected
    assert read("x", "--fast").inner.fast is True
    assert read("x", "--no-fast").inner.fast is False


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("x", "--depth", "deep"), "--depth"),
        (("x", "--hue", "green"), "--hue"),
        (("x", "--weight", "-1"), "weight is negative"),
        (("x", "--depht", "1"), "--depht"),
    ],
)
def test_a_bad_value_is_named(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], named: str) -> None:
    assert named in refused(capsys, *argv)


@pytest.mark.parametrize(("name", "value"), [("PDMESH_DEPTH", "deep"), ("PDMESH_FAST", "maybe"), ("PDMESH_HUE", "x")])
def test_a_bad_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert value in refused(capsys, "x")


def test_what_others_are_told_to_connect_to() -> None:
    assert ServiceConfig().advertised_host == "127.0.0.1"
    assert ServiceConfig(host="0.0.0.0").advertised_host == socket.gethostname()
    assert ServiceConfig(host="0.0.0.0", advertise="here").advertised_host == "here"


def test_fail_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        fail("mend this")
    assert raised.value.code == 2
    assert capsys.readouterr().err == "pdmesh: mend this\n"
