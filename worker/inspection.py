"""`python -m worker.inspection MODEL`: what the model is and what of it fits here, before anything is loaded.

`pdmesh model inspect` runs it. It imports what a worker does, so that its own memory tells what a worker's process
takes without a model. Exit codes: 0 it fits, 1 it does not, 2 a person must mend something first.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Nobody calls these four: they are weighed.
import engine.local_engine  # noqa: F401
import kvstore.redis_directory  # noqa: F401
import worker.exchange
import worker.host  # noqa: F401
from engine.config import EngineConfig
from engine.footprint.report import inspect_model
from pdmesh.config import fail, option, parse
from pdmesh.errors import ConfigError
from pdmesh.ranks.config import GroupConfig
from pdmesh.stdout import discard_stdout
from worker.inspection_screen import print_report

# What a worker's process takes beyond its imports, whatever the model: gRPC's server, threads, the kernels' library.
_SERVING_BYTES = 28_000_000
# Where the system does not tell: measured on Linux.
_UNTOLD_BYTES = 260_000_000


@dataclass(frozen=True, slots=True)
class InspectionConfig:
    engine: EngineConfig
    group: GroupConfig = field(default_factory=GroupConfig)
    json: bool = option("print JSON", default=False)


def main(argv: Sequence[str] | None = None) -> int:
    process_bytes = _resident_bytes() + _SERVING_BYTES
    config = parse(
        InspectionConfig,
        argv,
        prog="pdmesh model inspect",
        description="Says what a model is, and what serving it would take of this machine. Nothing is loaded.",
    )
    logging.basicConfig(level=logging.ERROR)
    try:
        report = inspect_model(config.engine, config.group, process_bytes)
    except ConfigError as error:
        fail(error.message)
    try:
        print_report(report, json=config.json)
    except BrokenPipeError:
        discard_stdout()
        return 1
    return 0 if report.verdict.fits else 1


def _resident_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _UNTOLD_BYTES
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), _UNTOLD_BYTES)


if __name__ == "__main__":
    sys.exit(main())
