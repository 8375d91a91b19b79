"""What each family's config.json says is read as transformers reads it, or refused in one line."""

from typing import Any

import pytest
import transformers

from engine.config_fields import Fields
from engine.decoder_config import DecoderLayers
from engine.model_config import ModelConfig
from engine.models import FAMILIES, config_from_hf
from engine.rope import LongRopeScaling
from pdmesh.errors import ConfigError

SIZES: dict[str, object] = {
    "vocab_size": 1000,
    "hidden_size": 4096,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
LONGROPE: dict[str, object] = {"rope_type": "longrope", "short_factor": [1.5] * 64, "long_factor": [9.0] * 64}


def read(family: str, **fields: object) -> ModelConfig:
    values = {"architectures": [f"{family}ForCausalLM"], **SIZES, **fields}
    return config_from_hf(Fields("/m/config.json", values), Fields("/m/generation_config.json", {}), "m")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    family = architecture.removesuffix("ForCausalLM")
    reference: Any = getattr(transformers, f"{family}Config")(**SIZES)
    config = read(family)
    layers = DecoderLayers.of(config)
    assert config.num_kv_heads == (reference.num_key_value_heads or reference.num_attention_heads)
    assert config.head_dim == getattr(reference, "head_dim", 4096 // 32)
    assert config.max_position == reference.max_position_embeddings
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert layers.norm.eps == reference.rms_norm_eps
    assert layers.rope.theta == reference.rope_parameters["rope_theta"]
    window = getattr(reference, "sliding_window", None)
    assert config.windows == ((window,) * 4 if window else ())


def test_what_tells_the_families_apart() -> None:
    assert DecoderLayers.of(read("Qwen2")).attention.qkv_bias
    assert not DecoderLayers.of(read("Qwen2")).attention.output_bias
    assert DecoderLayers.of(read("Qwen3")).attention.qk_norm
    partial = DecoderLayers.of(read("Phi3", partial_rotary_factor=0.75))
    assert partial.rope.rotary_dim(128) == 96


def test_windows() -> None:
    assert read("Mistral", sliding_window=None).windows == ()
    assert read("Mistral", sliding_window=100).windows == (100,) * 4
    # No text outgrows it.
    assert read("Mistral", sliding_window=100, max_position_embeddings=100).windows == ()
    assert read("Qwen2", sliding_window=100).windows == ()
    some = read("Qwen2", sliding_window=100, use_sliding_window=True, max_window_layers=3)
    assert some.windows == (None, None, None, 100)
    types = ["sliding_attention", "full_attention"] * 2
    assert read("Qwen3", sliding_window=9, use_sliding_window=True, layer_types=types).windows == (9, None, 9, None)


def test_longrope_serves_the_trained_length() -> None:
    config = read("Phi3", max_position_embeddings=131072, rope_scaling=LONGROPE)
    assert config.max_position == 4096
    scaling = DecoderLayers.of(config).rope.scaling
    assert isinstance(scaling, LongRopeScaling)
    assert scaling.factors == (1.5,) * 64


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("GPT2", {}, "architectures is ['GPT2ForCausalLM']: must name one of the known: LlamaForCausalLM, Mistral"),
        ("Mistral", {"sliding_window": -1}, "sliding_window is -1: must be an integer in [0, "),
        ("Mistral", {"sliding_window": "long"}, "sliding_window is 'long': must be an integer in [0, "),
        ("Mistral", {"layer_types": ["full_attention"] * 4}, "layer_types is ['full_attention', 'full_attention', "),
        ("Qwen2", {"use_sliding_window": 1}, "use_sliding_window is 1: must be true or false"),
        ("Qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types is ['full_attention']"),
        ("Qwen3", {"head_dim": 63}, "head_dim is 63: must be even"),
        ("Qwen3", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling.rope_type is 'dynamic': supported are"),
        ("Phi3", {"partial_rotary_factor": 0.01}, "partial_rotary_factor is 0.01: must turn an even number of a head'"),
        ("Phi3", {"partial_rotary_factor": 2}, "partial_rotary_factor is 2: must be a number in [0, 1]"),
        ("Phi3", {"rope_scaling": {"type": "llama3"}}, "rope_scaling.type is 'llama3': supported are default and long"),
        ("Phi3", {"rope_scaling": {"type": "su", "short_factor": [1, 0]}}, "rope_scaling.short_factor is [1, 0]: must"),
        ("Phi3", {"hidden_act": "gelu"}, "hidden_act is 'gelu': only silu is supported"),
    ],
)
def test_refusals_name_file_and_field(family: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(family, **fields)
    assert caught.value.message.startswith(f"/m/config.json: {message}")
    assert "\n" not in caught.value.message
