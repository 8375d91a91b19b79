"""How long it takes from the start of a process to the first token, and where the time goes."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pdmesh.errors import ConfigError

_ROOT = Path(__file__).resolve().parents[2]
_PHASES = ("entered", "imported", "loaded", "first_token")


def measure(model: str, *, dtype: str, threads: int, runs: int = 3) -> dict[str, float]:
    """Seconds: `total_s`, and what of it each phase takes, medians. One run before them fills the page cache.

    Raises ConfigError where a run fails.
    """
    return summarise([_run(model, dtype, threads) for _ in range(runs + 1)][1:])


def summarise(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians over runs, each of which says when each phase was over, from the start of its process."""
    ends = {phase: statistics.median(run[phase] for run in runs) for phase in _PHASES}
    return {
        "total_s": ends["first_token"],
        "interpreter_s": ends["entered"],
        "imports_s": ends["imported"] - ends["entered"],
        "load_s": ends["loaded"] - ends["imported"],
        "first_step_s": ends["first_token"] - ends["loaded"],
    }


def _run(model: str, dtype: str, threads: int) -> dict[str, float]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "bench.engine.start_probe", model, dtype, str(threads)],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(f"no first token: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    ends: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {phase: ends[phase] - began for phase in _PHASES}
