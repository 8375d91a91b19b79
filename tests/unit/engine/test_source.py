"""What a person may name as a model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the Hub, which itself is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_directory_is_named_for_itself(tiny_llama: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_llama("gqa"))
    assert open_checkpoint(".").config.name == "tiny-gqa"


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nowhere", "some/model.gguf", "a/b/c"])
def test_nothing_there(source: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(source)
    assert caught.value.message == (
        f"{source}: no such file or directory: name a model directory, a .gguf file or a Hub id"
    )


def test_hub_out_of_reach(hub_cache: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_checkpoint("pdmesh-tests/tiny")
    assert caught.value.message.startswith(
        "pdmesh-tests/tiny: no such path here, and not to be had from the Hugging Face Hub ("
    )
    assert caught.value.message.endswith("or download the model and name its directory")
    assert "\n" not in caught.value.message


def test_hub_id_from_its_cache(hub_cache: Path, tiny_llama: Callable[[str], Path]) -> None:
    commit = "0" * 40
    repository = hub_cache / "models--pdmesh-tests--tiny"
    shutil.copytree(tiny_llama("gqa"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    checkpoint = open_checkpoint("pdmesh-tests/tiny")
    assert checkpoint.config.name == "pdmesh-tests/tiny"
    assert len(checkpoint.tensors) == 30
