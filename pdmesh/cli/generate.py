"""`pdmesh generate PROMPT`: completes a prompt."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pdmesh.cli.answers import receive, sampling_options
from pdmesh.cli.connection import ConnectionConfig, SamplingConfig
from pdmesh.cli.json_output import to_json
from pdmesh.client import Client
from pdmesh.config import option, parse


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    connection: ConnectionConfig
    sampling: SamplingConfig
    prompt: str = option("the text to complete; - reads it from standard input", positional=True)
    chat: bool = option("send it as a user's chat message, through the model's template", default=False)
    model: str = option("the model's name; default: the one that is served", default="")
    timeout_s: float | None = option("seconds after which to give up; default: never", default=None)
    stream: bool = option("print the text as it comes", default=True)
    json: bool = option("print the whole result as JSON", default=False)


def main(argv: Sequence[str]) -> int:
    config = parse(GenerateConfig, argv, prog="pdmesh generate", description="Completes a prompt.")
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    options = sampling_options(config.sampling)
    options["model"] = config.model
    if config.chat:
        options["messages"] = [{"role": "user", "content": prompt}]
    text = None if config.chat else prompt
    with Client(config.connection.address) as client:
        streams = config.stream and not config.json
        answer = receive(
            client.stream(text, timeout_s=config.timeout_s, **options), _write if streams else lambda _: None
        )
    if config.json:
        print(to_json(answer.result, indent=2))
    elif not streams:
        print(answer.result.text)
    else:
        print()
    if sys.stderr.isatty():
        print(f"\n{answer.summary()}", file=sys.stderr)
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
