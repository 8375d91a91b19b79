"""`pdmesh COMMAND …`: finds the command and turns what it raises into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 something a person must mend first, 130 interrupted.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from pdmesh import __version__
from pdmesh.errors import ConfigError, InvalidRequestError, MeshError
from pdmesh.stdout import discard_stdout

# Each is a module of this package with `main(argv) -> exit code`.
_COMMANDS = {
    "up": "run a cluster on this machine",
    "model": "say what a model is, and what of it fits here",
    "generate": "complete a prompt",
    "chat": "talk to the model",
    "batch": "run a file of prompts",
    "status": "show the workers of a cluster",
    "transfers": "show how KV moves between the workers",
    "drain": "let a worker finish and leave",
    "health": "ask a server whether it serves",
    "demo": "fetch a small model, run a cluster, answer a few prompts",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in _COMMANDS:
        return _usage(argv)
    command = importlib.import_module(f"pdmesh.cli.{argv[0]}")
    try:
        return int(command.main(argv[1:]))
    except MeshError as error:
        print(f"pdmesh: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | InvalidRequestError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        discard_stdout()
        return 1


def _usage(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pdmesh",
        description="Serve language models with prefill and decode in separate pools.",
        epilog="`pdmesh COMMAND --help` tells a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"pdmesh {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        commands.add_parser(name, help=summary)
    if argv:
        parser.parse_args(argv)
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
