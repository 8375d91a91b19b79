"""A checkpoint that no machine has room for is refused by arithmetic, whatever its files hold."""

import json
import struct
from pathlib import Path

import pytest
import torch

from engine.loader import load_model
from pdmesh.errors import ConfigError
from tests.tiny_models import make_tiny_model

_HIDDEN, _VOCAB = 2**16, 2**22


def test_more_weights_than_memory(tmp_path: Path) -> None:
    """A terabyte of them, in a file of holes: its header is right, and every byte of it can be read."""
    model = make_tiny_model(tmp_path / "model", "mha_tied")
    fields = {"hidden_size": _HIDDEN, "vocab_size": _VOCAB, "num_hidden_layers": 1, "head_dim": 16}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))
    _write_holes(model / "model.safetensors")
    with pytest.raises(ConfigError) as refused:
        load_model(str(model), "float32", torch.device("cpu"), lambda done, total: None)
    assert refused.value.message.startswith(f"{model}: its weights take 1024.16 GiB in float32 and ")
    assert refused.value.message.endswith(f"`pdmesh model inspect {model}` says what would fit")


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
