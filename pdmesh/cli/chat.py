"""`pdmesh chat`: a conversation. Ctrl-C ends an answer, Ctrl-D the conversation."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from pdmesh.cli.answers import receive, sampling_options
from pdmesh.cli.connection import ConnectionConfig, SamplingConfig
from pdmesh.cli.terminal import make_console
from pdmesh.client import Client
from pdmesh.client_calls import Message
from pdmesh.config import option, parse
from pdmesh.errors import MeshError

with contextlib.suppress(ImportError):
    # Importing it gives input() history and line editing.
    import readline  # noqa: F401

_HELP = "Ctrl-C stops an answer, /new starts over, Ctrl-D leaves."


@dataclass(frozen=True, slots=True)
class ChatConfig:
    connection: ConnectionConfig
    sampling: SamplingConfig
    system: str | None = option("what the model is told before the conversation", default=None)
    model: str = option("the model's name; default: the one that is served", default="")


def main(argv: Sequence[str]) -> int:
    config = parse(ChatConfig, argv, prog="pdmesh chat", description=f"Talks to the model. {_HELP}")
    console = make_console()
    with Client(config.connection.address) as client:
        names = ", ".join(model.name for model in client.models()) or "no model is served yet"
        console.print(f"[bold]{names}[/bold]  [dim]{_HELP}[/dim]")
        _Conversation(client, config, console).run()
    return 0


class _Conversation:
    def __init__(self, client: Client, config: ChatConfig, console: Console) -> None:
        self._client = client
        self._config = config
        self._console = console
        self._history: list[Message] = []

    def run(self) -> None:
        """Returns when the person leaves."""
        self._start_over()
        while True:
            try:
                said = input("\n› ").strip()
            except KeyboardInterrupt:
                self._console.print(f"\n[dim]{_HELP}[/dim]")
                continue
            except EOFError:
                self._console.print()
                return
            if said == "/new":
                self._start_over()
                self._console.print("[dim]A new conversation.[/dim]")
            elif said:
                self._answer(said)

    def _start_over(self) -> None:
        system = self._config.system
        self._history = [Message(role="system", content=system)] if system else []

    def _answer(self, said: str) -> None:
        """Streams the answer. What came of it stays in the history; a question without any answer does not."""
        asked = [*self._history, Message(role="user", content=said)]
        pieces: list[str] = []

        def write(text: str) -> None:
            pieces.append(text)
            sys.stdout.write(text)
            sys.stdout.flush()

        options = sampling_options(self._config.sampling)
        options["messages"], options["model"] = asked, self._config.model
        events = self._client.stream(**options)
        try:
            answer = receive(events, write)
            self._console.print(f"\n[dim]{answer.summary()}[/dim]")
        except KeyboardInterrupt:
            self._console.print("\n[dim]stopped[/dim]")
        except MeshError as error:
            self._console.print(Text(f"\n{error.message}", "red"))
        finally:
            events.close()
        if pieces:
            self._history = [*asked, Message(role="assistant", content="".join(pieces))]
