"""A model that cannot be loaded: whatever is started with it says in one line which file it is and what to do."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.e2e

_PDMESH = ("-m", "pdmesh.cli.main")
_WEIGHTS = "model.safetensors"
_Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
# With torch's import, which is most of it, on a machine that is busy.
_MAX_S = 45.0

Break = Callable[[Path], object]


def _cut(model: Path) -> None:
    os.truncate(model / _WEIGHTS, (model / _WEIGHTS).stat().st_size - 100)


def _misshape(model: Path) -> None:
    tensors = load_file(model / _WEIGHTS)
    tensors[_Q_PROJ] = torch.zeros(64, 63)
    save_file(tensors, model / _WEIGHTS)


def _poison(model: Path) -> None:
    tensors = load_file(model / _WEIGHTS)
    tensors[_Q_PROJ][3, 5] = float("nan")
    save_file(tensors, model / _WEIGHTS)


def _configure(**fields: object) -> Break:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | fields))

    return change


_INSPECT = (*_PDMESH, "model", "inspect")
_DECODE = ("-m", "decode")
# Who is to find it, what is done to the model, and words of the line that says so.
_BROKEN: dict[str, tuple[tuple[str, ...], Break, str]] = {
    "truncated": (_INSPECT, _cut, f"{_WEIGHTS}: not a whole safetensors file"),
    "absurd": (_INSPECT, _configure(hidden_size=10**12), "config.json: hidden_size is 1000000000000: must be"),
    "unknown": (_INSPECT, _configure(architectures=["NewForCausalLM"]), "must name one of the known: "),
    "misshapen": (_DECODE, _misshape, f"{_Q_PROJ} has shape [64, 63]"),
    # No header shows it.
    "not-finite": (_DECODE, _poison, _Q_PROJ),
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}


def last_line(arguments: tuple[str, ...], environment: dict[str, str]) -> str:
    """What it ends with, which it must by itself: exit code 2, in time, without a traceback."""
    began = time.monotonic()
    done = subprocess.run(
        (sys.executable, *arguments), capture_output=True, text=True, check=False, env=environment, timeout=100
    )
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "Traceback" not in output
    assert time.monotonic() - began < _MAX_S
    return next(line for line in output.splitlines() if line.startswith("pdmesh: "))


@pytest.mark.parametrize("case", _BROKEN)
def test_a_process_names_the_file(tiny_model: Path, tmp_path: Path, environment: dict[str, str], case: str) -> None:
    command, damage, words = _BROKEN[case]
    model = shutil.copytree(tiny_model, tmp_path / "model")
    damage(model)
    # Nobody is there under this address: a worker is to end before it needs anybody.
    alone = ("--redis-url", f"unix://{tmp_path}/nobody", "--drain-s", "1") if command is _DECODE else ()
    line = last_line((*command, str(model), *alone), environment)
    assert line.startswith(f"pdmesh: {model}/")
    assert words in line


def test_a_cluster_ends_at_once_and_quotes_it(tiny_model: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    _misshape(model)
    line = last_line((*_PDMESH, "up", str(model), "--port", "0", "--run-dir", str(tmp_path / "run")), environment)
    assert f"could not start: {model}/{_WEIGHTS}: tensor {_Q_PROJ} has shape [64, 63]" in line


def test_a_router_names_the_tokenizer(tiny_model: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    router = ("-m", "router", str(model), "--redis-url", f"unix://{tmp_path}/nobody", "--drain-s", "1")
    assert last_line(router, environment).startswith(f"pdmesh: {model}/tokenizer.json: no tokenizer")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes somebody who may not read the model")
def test_no_leave_to_read(tiny_model: Path, tmp_path: Path) -> None:
    """In a process that gives up its rights once all is imported."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / _WEIGHTS).chmod(0o600)
    for path in (model, *model.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(0o755)
    code = (
        "import os, sys; import worker.inspection as inspection; os.seteuid(65534); "
        "sys.exit(inspection.main(sys.argv[1:]))"
    )
    for refused in (model / _WEIGHTS, model):
        refused.chmod(0o600)
        done = subprocess.run(
            (sys.executable, "-c", code, str(model)), capture_output=True, text=True, check=False, timeout=100
        )
        assert done.returncode == 2, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"pdmesh: {refused}")
        assert "ermission" in line


def test_whoever_has_read_enough_of_what_inspect_says(tiny_model: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        command = [sys.executable, "-m", "pdmesh.cli.main", "model", "inspect", str(tiny_model), "--json"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
