"""Checkpoints as families lay them out: older ones with other names, and ranks that read parts of fused maps."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from engine.loader import LoadedModel, Split, load_model
from pdmesh.errors import ConfigError
from tests.texts import CPU, Texts, load, random_text, reference_logits
from tests.tiny_families import make_tiny_family

# The stored prefix that older checkpoints leave out, and what they hold besides.
OLD = {
    "gpt2": ("transformer.", {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.2.attn.masked_bias": torch.tensor(-1e4)}),
    "bloom": ("transformer.", {}),
    "opt": ("model.", {}),
    "gpt-neox": (
        "",
        {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8),
            "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.2.attention.rotary_emb.inv_freq": torch.ones(2),
        },
    ),
}


def assert_same_parameters(loaded: LoadedModel, expected: LoadedModel) -> None:
    parameters = dict(loaded.model.named_parameters())
    for name, values in expected.model.named_parameters():
        assert torch.equal(parameters.pop(name), values), name
    assert not parameters


@pytest.mark.parametrize("shape", OLD)
def test_older_checkpoints(tmp_path: Path, shape: str) -> None:
    directory = make_tiny_family(tmp_path, shape)
    expected = load(directory)
    prefix, besides = OLD[shape]
    tensors = {name.removeprefix(prefix): values for name, values in load_file(directory / "model.safetensors").items()}
    save_file(tensors | besides, directory / "model.safetensors", metadata={"format": "pt"})
    assert_same_parameters(load(directory), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_masks_that_older_checkpoints_hold_are_of_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    for shape, mask in (("gpt-neox", "gpt_neox.layers.0.attention.bias"), ("gpt2", "transformer.h.0.attn.bias")):
        directory = make_tiny_family(tmp_path / shape, shape)
        expected = load(directory)
        tensors = load_file(directory / "model.safetensors") | {mask: torch.ones(1, 1, 9, 9, dtype=dtype).tril()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        assert_same_parameters(load(directory), expected)


def test_an_output_matrix_beside_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    directory = make_tiny_family(tmp_path, "gpt2")
    expected = load(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert_same_parameters(load(directory), expected)


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
        ("bloom", "transformer.h.0.self_attention.query_key_value.bias"),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.5.w3.weight"),
        ("gemma3", "model.layers.3.post_feedforward_layernorm.weight"),
    ],
)
def test_what_is_missing_or_misshapen_is_told_by_its_stored_name(tmp_path: Path, shape: str, stored: str) -> None:
    directory = make_tiny_family(tmp_path, shape)
    tensors = load_file(directory / "model.safetensors")
    values = tensors.pop(stored)
    for change, message in (
        ({}, f"tensor {stored} is missing: "),
        (
            {stored: values[:-1].clone()},
            f"tensor {stored} has shape {list(values[:-1].shape)}, and the config asks for {list(values.shape)}: ",
        ),
    ):
        save_file(tensors | change, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError) as caught:
            load(directory)
        assert caught.value.message.startswith(f"{directory / 'model.safetensors'}: {message}")


@pytest.mark.parametrize("shape", ["gpt2", "opt-post", "bloom-heads", "gpt-neox", "mixtral", "qwen3-moe-some"])
def test_ranks_together_have_the_model(tmp_path: Path, shape: str) -> None:
    directory = make_tiny_family(tmp_path, shape)
    whole = dict(load(directory).model.named_parameters())
    ranks = []
    for rank in range(2):
        loaded = load_model(str(directory), "float32", CPU, lambda done, total: None, Split(tp=2, rank=rank))
        ranks.append(dict(loaded.model.named_parameters()))
    assert set(ranks[0]) == set(whole)
    for name, values in whole.items():
        parts: list[torch.Tensor] = [rank[name] for rank in ranks if name in rank]
        if all(torch.equal(part, values) for part in parts):
            # Norms, routers and positions; and the bias of a sum, which one rank adds.
            assert len(parts) == 2 or name.endswith(("o_proj.bias", "down_proj.bias")), name
        else:
            by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert torch.equal(torch.cat(parts, dim=1 if by_columns else 0), values), name


def test_of_a_model_that_sees_images_the_text_model_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {
        **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "query_pre_attn_scalar": 16},
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config_json = json.loads(path.read_text())
    # As published: what is the default is not said.
    path.write_text(json.dumps({**config_json, "text_config": text}))
    texts = Texts(load(tmp_path), [random_text(40)])
    texts.step({0: 40})
    expected = reference_logits(tmp_path, texts.texts[0])
    assert (texts.logits_of(0) - expected).abs().max() < 2e-5 * expected.abs().max()
