import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.engine.installed import Installed, find_peer
from bench.engine.peers.adapter import LoadRequest
from bench.engine.processes import EngineProcess, Measured, parse_measured
from pdmesh.errors import ConfigError


def load_request(model: str) -> LoadRequest:
    return LoadRequest(model=model, dtype="bfloat16", device="cpu", threads=1, vocab_size=10, max_len=16, max_seqs=2)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    installed = Installed("counting", Path(sys.executable), "tests.unit.bench.counting_engine", {})
    with EngineProcess(installed, tmp_path / "log") as process:
        yield process


def test_loads_and_measures(engine: EngineProcess, tmp_path: Path) -> None:
    engine.load(load_request("any"))
    assert engine.version == "counting bfloat16"
    assert engine.ready_s >= 0
    assert engine.measure({"prefill": 8, "prompts": 2, "seed": 0}) == Measured(8.0, (0, 0))
    assert engine.measure({"decode": 2, "prompt": 4, "tokens": 3, "seed": 0}) == Measured(2.0, (0, 1))
    assert engine.cpu_s() > 0
    assert "generating" in (tmp_path / "log").read_text()


def test_says_why_an_engine_cannot_load(engine: EngineProcess, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="counting failed: FileNotFoundError: no such model") as caught:
        engine.load(load_request("missing"))
    assert str(tmp_path / "log") in caught.value.message


def test_an_engine_that_ends_is_told_of(engine: EngineProcess) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match="counting failed: it ended"):
            engine.load(load_request("crashing"))
    engine.close()
    engine.close()


def test_parses_a_reply() -> None:
    assert parse_measured({"tokens_per_s": 2, "first_tokens": [3, 4]}) == Measured(2.0, (3, 4))


def test_a_peer_that_is_missing_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDMESH_PEERS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"install_peers\.sh llamacpp"):
        find_peer("llamacpp", device="cpu", threads=2)
    with pytest.raises(ConfigError, match="no peer nobody"):
        find_peer("nobody", device="cpu", threads=2)


def test_a_peer_that_is_installed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDMESH_PEERS", str(tmp_path))
    preloaded = tmp_path / "vllm" / "tcmalloc" / "usr" / "lib" / "libtcmalloc_minimal.so.4"
    preloaded.parent.mkdir(parents=True)
    preloaded.touch()
    (tmp_path / "vllm" / ".installed").touch()
    found = find_peer("vllm", device="cpu", threads=1)
    assert found.python == tmp_path / "vllm" / "bin" / "python"
    assert found.environment["LD_PRELOAD"] == str(preloaded)
    assert found.environment["OMP_NUM_THREADS"] == "1"
