from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.engine.checkpoints import prepare, write_gguf
from bench.engine.random_llama import TINY, write_random_llama
from engine.decoder_config import DecoderLayers
from engine.loader import load_model
from engine.rope import LinearScaling
from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError
from tests.tiny_families import make_tiny_family
from tests.tiny_models import make_tiny_model

CPU = torch.device("cpu")
SMALL = replace(TINY, vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, head_dim=8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def assert_same_weights(left: Path, right: Path) -> None:
    ours, theirs = open_checkpoint(str(left)), open_checkpoint(str(right))
    assert set(ours.tensors) == set(theirs.tensors)
    for name in ours.tensors:
        assert torch.equal(ours.read(name, torch.bfloat16), theirs.read(name, torch.bfloat16)), name


def test_the_gguf_file_and_the_directory_hold_the_same_weights(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, "gqa")
    prepared = prepare(str(directory), "bfloat16", with_gguf=True)
    assert prepared.directory == directory
    assert_same_weights(directory, prepared.gguf_file)
    # And back again: what a user gave as GGUF becomes a directory.
    again = prepare(str(prepared.gguf_file), "bfloat16", with_gguf=False)
    assert again.directory != directory
    assert_same_weights(directory, again.directory)
    assert replace(again.config, name="") == replace(open_checkpoint(str(again.directory)).config, name="")


def test_what_is_prepared_stays(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, "mha_tied")
    prepared = prepare(str(directory), "bfloat16", with_gguf=True)
    written = prepared.gguf_file.stat().st_mtime_ns
    assert prepare(str(directory), "bfloat16", with_gguf=True) == prepared
    assert prepared.gguf_file.stat().st_mtime_ns == written
    assert prepare(str(directory), "float32", with_gguf=False).gguf_file != prepared.gguf_file


def test_scaled_rotary_embeddings_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_tiny_model(tmp_path, "rope_linear")))
    assert isinstance(DecoderLayers.of(checkpoint.config).rope.scaling, LinearScaling)
    with pytest.raises(ConfigError, match="leave llamacpp out"):
        write_gguf(checkpoint, "bfloat16", tmp_path / "model.gguf")


def test_other_families_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_tiny_family(tmp_path / "hf", "qwen3")))
    with pytest.raises(ConfigError, match="is a Qwen3ForCausalLM, and the bench converts only Llamas"):
        write_gguf(checkpoint, "bfloat16", tmp_path / "model.gguf")


def test_a_random_llama_loads(tmp_path: Path) -> None:
    directory = write_random_llama(SMALL, "bfloat16", tmp_path, CPU)
    loaded = load_model(str(directory), "bfloat16", CPU, lambda done, total: None)
    assert replace(loaded.config, name=SMALL.name) == SMALL
    parameters = dict(loaded.model.named_parameters())
    assert torch.equal(parameters["model.norm.weight"], torch.ones(32, dtype=torch.bfloat16))
    assert parameters["lm_head.weight"].float().std().item() == pytest.approx(0.02, rel=0.1)
