"""Configuration: a frozen dataclass becomes flags, environment variables and a help text.

Precedence: flag, then environment (PDMESH_ and the field's name in capitals), then default. Each field is declared
with `option`, or is itself such a dataclass, whose fields become flags beside the others. A wrong value ends the
process with one line that names the flag.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from pdmesh.errors import ConfigError

T = TypeVar("T")

ENV_PREFIX = "PDMESH_"

_EVERY_ADDRESS = ("0.0.0.0", "::", "[::]")


def option(help: str, *, default: Any = MISSING, choices: Sequence[str] | None = None, positional: bool = False) -> Any:
    """A config field. No default: it must be given. Types: str, int, float, bool, or one of these | None."""
    metadata = {"help": help, "choices": choices, "positional": positional}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """What every service is told."""

    host: str = option("address to listen on", default="127.0.0.1")
    port: int = option("gRPC port; 0 takes a free one", default=0)
    advertise: str | None = option(
        "host name under which others reach this process; default: the host, or this machine's name where that is "
        "every address",
        default=None,
    )
    redis_url: str = option(
        "the directory, e.g. redis://127.0.0.1:6379/0 or unix:///run/redis.sock",
        default="redis://127.0.0.1:6379/0",
    )
    cluster: str = option("name that keeps clusters on one Redis apart", default="default")
    log_level: str = option("least severe level logged", default="info", choices=("debug", "info", "warning", "error"))
    drain_s: float = option("seconds given to running requests after SIGTERM", default=30.0)
    metrics_port: int = option("HTTP port of /metrics, for Prometheus; 0 serves none", default=0)

    def __post_init__(self) -> None:
        if not 0 <= self.metrics_port <= 65535:
            raise ConfigError(f"--metrics-port is {self.metrics_port}: must lie in [0, 65535]")

    @property
    def advertised_host(self) -> str:
        """`advertise`, decided. In a container, this machine's name is the container's, which its peers resolve."""
        return self.advertise or (socket.gethostname() if self.host in _EVERY_ADDRESS else self.host)


def parse(cls: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str) -> T:
    """Reads a config of dataclass `cls` from flags and environment; exits with usage on bad input."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    _add_flags(parser, cls)
    values = vars(parser.parse_args(argv))
    try:
        return _build(cls, values)
    except ConfigError as error:
        parser.error(error.message)


def _add_flags(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    hints = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            _add_flags(parser, hints[f.name])
        else:
            _add_flag(parser, f.name, hints[f.name], f.default, f.metadata)


def _build(cls: type[T], values: dict[str, Any]) -> T:
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    return cls(**{n: _build(hints[n], values) if is_dataclass(hints[n]) else values[n] for n in names})


def _add_flag(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, metadata: Any) -> None:
    kinds = [arg for arg in get_args(hint) if arg is not type(None)]
    kind = kinds[0] if kinds else hint
    env_name = ENV_PREFIX + name.upper()
    env_value = os.environ.get(env_name)
    required = default is MISSING and env_value is None
    options: dict[str, Any] = {"help": f"{metadata['help']} (env {env_name})"}
    if not required:
        options["default"] = env_value if env_value is not None else default
        if default not in (MISSING, None):
            options["help"] += f"; default: {default}"
    if kind is bool:
        # argparse runs `type` over string defaults only, so the environment passes through _boolean too.
        parser.add_argument("--" + name.replace("_", "-"), action=argparse.BooleanOptionalAction, **options)
        if isinstance(options.get("default"), str):
            parser.set_defaults(**{name: _boolean(parser, env_name, options["default"])})
        return
    options["type"] = kind
    options["choices"] = choices = metadata["choices"]
    # argparse compares flags with the choices, but not defaults.
    if env_value is not None and choices is not None and env_value not in choices:
        parser.error(f"{env_name} is {env_value!r}: choose from {', '.join(choices)}")
    if metadata["positional"]:
        parser.add_argument(name, nargs=None if required else "?", **options)
    else:
        parser.add_argument("--" + name.replace("_", "-"), required=required, **options)


def _boolean(parser: argparse.ArgumentParser, name: str, text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    parser.error(f"{name} is {text!r}: use true or false")


def fail(message: str) -> None:
    """Ends the process as every command does when a person must mend something: one line, exit code 2."""
    # A name that it tells may hold line breaks.
    shown = message.replace("\r", "\\r").replace("\n", "\\n")
    print(f"pdmesh: {shown}", file=sys.stderr)
    raise SystemExit(2)
