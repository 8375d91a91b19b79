"""What fits is arithmetic: what no machine has room for is refused before anything is allocated."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.footprint.report import inspect_model
from engine.loader import load_model
from pdmesh.errors import ConfigError
from pdmesh.ranks.config import GroupConfig
from tests.tiny_models import make_tiny_model

_HIDDEN, _VOCAB = 2**16, 2**22


def test_more_weights_than_memory(tmp_path: Path) -> None:
    """A terabyte of them, in a file of holes: its header is right, and every byte of it can be read."""
    model = _absurd_model(tmp_path / "model")
    with pytest.raises(ConfigError) as refused:
        load_model(str(model), "float32", torch.device("cpu"), lambda done, total: None)
    assert refused.value.message.startswith(f"{model}: weights take 1024.16 GiB in float32 and ")
    assert "GiB are free: use --device-map auto" in refused.value.message


def test_it_does_not_fit_and_something_is_to_be_done(tmp_path: Path) -> None:
    model = _absurd_model(tmp_path / "model")
    verdict = inspect_model(EngineConfig(model=str(model)), GroupConfig(), process_bytes=1).verdict
    assert not verdict.fits
    assert verdict.problem.startswith("the weights take 1099.7 GB and ")


def test_a_device_map_that_cannot_be_read_is_no_question_of_room(tiny_model: Path, tmp_path: Path) -> None:
    config = EngineConfig(model=str(tiny_model), device="cpu", device_map=str(tmp_path / "map.json"))
    with pytest.raises(ConfigError, match=r"map\.json: not readable as JSON"):
        inspect_model(config, GroupConfig(), process_bytes=1)


def test_remedies_are_options_that_help(tiny_model: Path) -> None:
    config = EngineConfig(model=str(tiny_model), device="cpu", num_blocks=10**9)
    verdict = inspect_model(config, GroupConfig(), process_bytes=1).verdict
    assert "lower num_blocks or kv_cache_bytes" in verdict.problem
    assert any(remedy.startswith("leave the size of the KV cache to the engine: ") for remedy in verdict.remedies)
    mended = inspect_model(replace(config, num_blocks=None), GroupConfig(), process_bytes=1).verdict
    assert mended.fits
    assert mended.remedies == ()
    # As many as the engine makes: a request of the model's context, and how many of them there is room for.
    longest = mended.contexts[-1]
    assert longest.num_tokens == mended.max_model_len == 1024
    assert longest.num_requests == mended.num_blocks * 16 // 1024


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 3), (2, 2)])
def test_ranks_share_what_one_has(tiny_model: Path, tp: int, pp: int) -> None:
    config = EngineConfig(model=str(tiny_model), device="cpu", num_blocks=100)
    (alone,) = inspect_model(config, GroupConfig(), process_bytes=1).serving.ranks
    ranks = inspect_model(config, GroupConfig(tp=tp, pp=pp), process_bytes=1).serving.ranks
    assert len(ranks) == tp * pp
    assert sum(rank.kv_cache for rank in ranks) == alone.kv_cache
    # Matrices are padded, and norms are everybody's.
    total = sum(rank.weights.total for rank in ranks)
    assert alone.weights.total <= total <= 1.25 * alone.weights.total


def _absurd_model(directory: Path) -> Path:
    model = make_tiny_model(directory, "mha_tied")
    fields = {"hidden_size": _HIDDEN, "vocab_size": _VOCAB, "num_hidden_layers": 1, "head_dim": 16}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))
    _write_holes(model / "model.safetensors")
    return model


def _write_holes(path: Path) -> None:
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (_VOCAB, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
        f"{layer}.input_layernorm.weight": (_HIDDEN,),
        f"{layer}.post_attention_layernorm.weight": (_HIDDEN,),
        **{f"{layer}.self_attn.{name}_proj.weight": (64, _HIDDEN) for name in "qkv"},
        f"{layer}.self_attn.o_proj.weight": (_HIDDEN, 64),
        **{f"{layer}.mlp.{name}_proj.weight": (128, _HIDDEN) for name in ("gate", "up")},
        f"{layer}.mlp.down_proj.weight": (_HIDDEN, 128),
    }
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (begin, end)}
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + end)


def test_weights_that_wait_on_disk_take_no_memory(tmp_path: Path) -> None:
    fields = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=12, **fields)).save_pretrained(tmp_path / "model")
    whole = EngineConfig(model=str(tmp_path / "model"), device="cpu", num_blocks=100)
    (rank,) = inspect_model(whole, GroupConfig(), process_bytes=1).serving.ranks
    half = rank.weights.total // 2
    config = replace(whole, max_memory=f"cpu={half}", offload_dir=str(tmp_path))
    (offloaded,) = inspect_model(config, GroupConfig(), process_bytes=1).serving.ranks
    assert rank.waiting == {}
    assert rank.resident_weights == rank.weights.total
    assert set(offloaded.waiting) == {"disk"}
    # What lies in panels is padded.
    assert offloaded.resident_weights < 1.05 * half
