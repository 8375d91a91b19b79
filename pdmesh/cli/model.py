"""`pdmesh model inspect MODEL`: what a model is and what of it fits here.

Exit codes: 0 it fits, 1 it does not, 2 something a person must mend first.
"""

import argparse
import importlib.util
import os
import subprocess
from collections.abc import Sequence

from pdmesh.errors import ConfigError
from pdmesh.local.commands import service

_MODULES = {"inspect": "worker.inspection"}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="pdmesh model", description="Looks at models.", add_help=not argv[1:])
    parser.add_argument(
        "command", choices=sorted(_MODULES), help="inspect: what a model is, and what serving it takes of this machine"
    )
    command, rest = parser.parse_known_args(argv[:1])[0].command, argv[1:]
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("a model is inspected by what would serve it: pip install 'pdmesh[engine]'")
    # A process of its own, as every service is: this package imports no engine.
    spec = service(command, (_MODULES[command], *rest))
    return subprocess.run(spec.command, env={**os.environ, **spec.env}, check=False).returncode
