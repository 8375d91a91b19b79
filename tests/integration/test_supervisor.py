"""What a worker's command is before it has ranks: light, so that they start at once, now and every time after."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# What its ranks import, and each of them takes longer than all that a supervisor does.
_HEAVY = {"torch", "numpy", "grpc", "google", "redis"}
_START_TIMEOUT_S = 20.0
_MAX_CPU_S = 0.5

roles = pytest.mark.parametrize("role", ["decode", "prefill"])


@roles
def test_a_supervisor_imports_nothing_that_computes_or_serves(role: str) -> None:
    code = f"import sys, {role}.__main__; print(*{{name.partition('.')[0] for name in sys.modules}})"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "pdmesh" in imported
    assert not _HEAVY & set(imported)


@roles
def test_a_supervisor_starts_its_ranks_at_once(role: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", role, str(tmp_path), "--tp", "3"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            supervisor = psutil.Process(process.pid)
            deadline = time.monotonic() + _START_TIMEOUT_S
            while len(supervisor.children()) < 3:
                assert process.poll() is None, "it has not ended before its ranks started"
                assert time.monotonic() < deadline, f"{len(supervisor.children())} ranks"
                time.sleep(0.005)
            # Its own time, not the wall's, which it shares with the ranks and whatever else runs here.
            used = supervisor.cpu_times()
            libraries = [Path(mapped.path).name for mapped in supervisor.memory_maps() if ".so" in mapped.path]
        finally:
            # Its ranks die with it.
            process.kill()
    assert used.user + used.system < _MAX_CPU_S
    assert libraries
    assert not [name for name in libraries if "torch" in name]
