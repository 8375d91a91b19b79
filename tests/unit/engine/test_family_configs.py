"""What each family's config.json says is read as transformers reads it, or refused in one line."""

import copy
import re
from typing import Any

import pytest
import transformers

from engine.config_fields import Fields
from engine.decoder_config import AlibiPositions, DecoderLayers, ExpertsConfig, LearnedPositions, RotaryPositions
from engine.model_config import ModelConfig
from engine.models import FAMILIES, config_from_hf
from engine.rope import LinearScaling, LongRopeScaling, RopeConfig
from pdmesh.errors import ConfigError

SIZES: dict[str, object] = {
    "vocab_size": 1000,
    "hidden_size": 4096,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
# Sizes as families call them whose configs do not know the usual names.
OWN_SIZES: dict[str, dict[str, object]] = {
    "Bloom": {"vocab_size": 1000, "hidden_size": 4096, "n_layer": 4, "n_head": 32},
    "GPT2": {"vocab_size": 1000, "n_embd": 4096, "n_inner": 128, "n_layer": 4, "n_head": 32},
    "OPT": {"vocab_size": 1000, "hidden_size": 4096, "ffn_dim": 128, "num_hidden_layers": 4, "num_attention_heads": 32},
}
ARCHITECTURES = {"GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
LONGROPE: dict[str, object] = {"rope_type": "longrope", "short_factor": [1.5] * 64, "long_factor": [9.0] * 64}


def read(family: str, **fields: object) -> ModelConfig:
    architecture = ARCHITECTURES.get(family, f"{family}ForCausalLM")
    values = {"architectures": [architecture], **OWN_SIZES.get(family, SIZES), **fields}
    return config_from_hf(Fields("/m/config.json", values), Fields("/m/generation_config.json", {}), "m")


FAMILY_NAMES = [
    name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    for name, family in FAMILIES.items()
    if family.text_group is None
]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    reference: Any = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**OWN_SIZES.get(family, SIZES))
    config = read(family)
    layers = DecoderLayers.of(config)
    assert config.num_kv_heads == (getattr(reference, "num_key_value_heads", None) or reference.num_attention_heads)
    assert config.head_dim == (getattr(reference, "head_dim", None) or 4096 // 32)
    assert config.max_position == getattr(reference, "max_position_embeddings", 2048)
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    eps = [getattr(reference, name, None) for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")]
    assert layers.norm.eps == next((value for value in eps if value is not None), 1e-5)
    window = getattr(reference, "sliding_window", None)
    if family in ("Gemma2", "Gemma3"):
        assert [size is not None for size in config.windows] == [
            kind == "sliding_attention" for kind in reference.layer_types
        ]
        assert set(config.windows) <= {window, None}
    else:
        assert config.windows == ((window,) * 4 if window else ())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_positions_are_those_of_transformers(family: str) -> None:
    reference: Any = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**OWN_SIZES.get(family, SIZES))
    config = read(family)
    positions = DecoderLayers.of(config).positions
    if family in ("GPT2", "OPT"):
        assert positions == LearnedPositions(offset=2 if family == "OPT" else 0)
    elif family == "Bloom":
        assert positions == AlibiPositions()
    else:
        assert isinstance(positions, RotaryPositions)
        ropes = reference.rope_parameters
        kinds = [ropes["full_attention"], ropes["sliding_attention"]] if family == "Gemma3" else [ropes]
        assert [table.theta for table in positions.tables] == [kind["rope_theta"] for kind in kinds]
        turned = kinds[0].get("partial_rotary_factor", 1.0) * config.head_dim
        assert [table.rotary_dim(config.head_dim) for table in positions.tables] == [turned] * len(kinds)


def test_of_a_model_that_sees_images_the_text_model_is_read() -> None:
    # As published, of 4 billion parameters.
    text: dict[str, Any] = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    values = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "text_config": text}
    config = config_from_hf(Fields("/m/config.json", values), Fields("/m/generation_config.json", {}), "m")
    reference: Any = transformers.Gemma3Config(text_config=copy.deepcopy(text)).text_config
    assert (config.vocab_size, config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (
        reference.vocab_size,
        reference.num_hidden_layers,
        reference.num_attention_heads,
        reference.num_key_value_heads,
        reference.head_dim,
    )
    assert config.max_position == reference.max_position_embeddings
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (1, 106)
    kinds = ["full_attention" if size is None else "sliding_attention" for size in config.windows]
    assert kinds == reference.layer_types
    assert set(config.windows) == {1024, None}
    positions = DecoderLayers.of(config).positions
    assert isinstance(positions, RotaryPositions)
    assert [table.theta for table in positions.tables] == [1e6, 1e4]
    for changed, message in (
        ({"text_config": None}, "text_config is None: must hold the text model's fields"),
        ({"text_config": {**text, "hidden_size": "x"}}, "text_config.hidden_size is 'x': must be an integer"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised safetensors are not supported"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            config_from_hf(Fields("/m/config.json", values | changed), Fields("/m/generation_config.json", {}), "m")


def test_what_tells_the_families_apart() -> None:
    assert DecoderLayers.of(read("Qwen2")).attention.qkv_bias
    assert not DecoderLayers.of(read("Qwen2")).attention.output_bias
    assert DecoderLayers.of(read("Qwen3")).attention.qk_norm
    gemma2, gemma3 = DecoderLayers.of(read("Gemma2")), DecoderLayers.of(read("Gemma3"))
    assert (gemma2.attention.soft_cap, gemma2.logit_soft_cap, gemma2.attention.qk_norm) == (50.0, 30.0, False)
    assert (gemma3.attention.soft_cap, gemma3.logit_soft_cap, gemma3.attention.qk_norm) == (None, None, True)
    assert gemma2.score_scale(128) == gemma3.score_scale(128) == 256**-0.5
    assert gemma2.residual == gemma3.residual == "sandwich"
    assert DecoderLayers.of(read("GPTNeoX")).residual == "parallel"
    assert DecoderLayers.of(read("GPTNeoX", use_parallel_residual=False)).residual == "pre"
    assert DecoderLayers.of(read("OPT")).residual == "pre"
    narrow = DecoderLayers.of(read("OPT", do_layer_norm_before=False, word_embed_proj_dim=512))
    assert (narrow.residual, narrow.final_norm, narrow.embedding.size) == ("post", False, 512)
    assert DecoderLayers.of(read("Mixtral")).experts == ExpertsConfig(8, 2, True, 128)
    some = DecoderLayers.of(read("Qwen3Moe", num_experts=64, decoder_sparse_step=2, mlp_only_layers=[3])).experts
    assert some == ExpertsConfig(64, 8, False, 768, (False, True, False, False))
    partial = DecoderLayers.of(read("Phi3", partial_rotary_factor=0.75))
    assert partial.rope.rotary_dim(128) == 96


def test_names_of_old_configs() -> None:
    bloom = read("Bloom", hidden_size=None, n_embed=1024, n_head=None, num_attention_heads=16, seq_length=4096)
    assert (bloom.hidden_size, bloom.num_heads, bloom.max_position) == (1024, 16, 4096)
    assert (bloom.intermediate_size, read("GPT2", n_inner=None).intermediate_size) == (4096, 16384)
    pythia = DecoderLayers.of(read("GPTNeoX", rotary_pct=0.5, rotary_emb_base=500.0)).rope
    assert (pythia.theta, pythia.num_rotary_dims) == (500.0, 64)
    gemma = read(
        "Gemma3",
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        rope_local_base_freq=5.0,
        sliding_window_pattern=2,
    )
    assert DecoderLayers.of(gemma).positions == RotaryPositions(
        (RopeConfig(1e6, LinearScaling(8.0)), RopeConfig(5.0)), (1, 0, 1, 0)
    )


GEMMA3_ROPES: dict[str, dict[str, Any]] = {
    "of transformers 4": {
        "rope_theta": 5e5,
        "rope_local_base_freq": 33.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "bases beside": {
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 3.0}, "sliding_attention": {}},
        "rope_theta": 777.0,
        "rope_local_base_freq": 55.0,
    },
    "one kind": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e5}},
        "rope_local_base_freq": 55.0,
    },
    "as types were called": {
        "rope_parameters": {
            "full_attention": {"type": "linear", "factor": 3.0, "rope_theta": 1e5},
            "sliding_attention": {"type": "linear", "factor": 2.0, "rope_theta": 1e3},
        }
    },
    "scaling beside": {
        "rope_parameters": {"full_attention": {"rope_theta": 1e5}, "sliding_attention": {"rope_theta": 1e3}},
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}


@pytest.mark.parametrize("fields", GEMMA3_ROPES.values(), ids=GEMMA3_ROPES)
def test_spellings_of_the_two_ropes_of_gemma3(fields: dict[str, Any]) -> None:
    # Of both kinds there is a layer.
    fields = fields | {"num_hidden_layers": 6}
    positions = DecoderLayers.of(read("Gemma3", **fields)).positions
    assert isinstance(positions, RotaryPositions)
    reference: Any = transformers.Gemma3TextConfig(**copy.deepcopy(SIZES | fields)).rope_parameters
    for table, kind in zip(positions.tables, ("full_attention", "sliding_attention"), strict=True):
        assert table.theta == reference[kind]["rope_theta"]
        factor = reference[kind]["factor"] if reference[kind]["rope_type"] == "linear" else None
        assert table.scaling == (None if factor is None else LinearScaling(factor))


def test_what_transformers_does_not_read_counts_for_nothing() -> None:
    assert DecoderLayers.of(read("Gemma3", attn_logit_softcapping=3.0)).attention.soft_cap is None
    assert DecoderLayers.of(read("Gemma3", _sliding_window_pattern=2)) == DecoderLayers.of(read("Gemma3"))
    scaled = read("Llama", rope_scaling={}, rope_parameters={"rope_type": "linear", "factor": 2.0})
    assert DecoderLayers.of(scaled).rope.scaling == LinearScaling(2.0)
    both = read("GPTNeoX", rotary_pct=0.5, partial_rotary_factor=0.5, rotary_emb_base=500, rope_theta=500.0)
    assert (DecoderLayers.of(both).rope.theta, DecoderLayers.of(both).rope.num_rotary_dims) == (500.0, 64)


def test_dynamic_scaling_serves_the_trained_length() -> None:
    dynamic = read("Llama", rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=4096)
    assert dynamic.max_position == 4096
    assert DecoderLayers.of(dynamic).rope == RopeConfig()


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
        ("GPT1", {}, "architectures is ['GPT1ForCausalLM']: must name one of the known: BloomForCausalLM, Gemma2Fo"),
        ("Mistral", {"sliding_window": -1}, "sliding_window is -1: must be an integer in [0, "),
        ("Mistral", {"sliding_window": "long"}, "sliding_window is 'long': must be an integer in [0, "),
        ("Mistral", {"layer_types": ["full_attention"] * 4}, "layer_types is ['full_attention', 'full_attention', "),
        ("Qwen2", {"use_sliding_window": 1}, "use_sliding_window is 1: must be true or false"),
        ("Qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types is ['full_attention']"),
        ("Qwen3", {"head_dim": 63}, "head_dim is 63: must be even"),
        ("Qwen3", {"rope_scaling": {"rope_type": "other"}}, "rope_scaling.rope_type is 'other': supported are"),
        ("Phi3", {"partial_rotary_factor": 0.01}, "partial_rotary_factor is 0.01: must turn an even number of a head'"),
        ("Phi3", {"partial_rotary_factor": 2}, "partial_rotary_factor is 2: must be a number in [0, 1]"),
        ("Phi3", {"rope_scaling": {"type": "llama3"}}, "rope_scaling.type is 'llama3': supported are default, lin"),
        ("Phi3", {"rope_scaling": {"type": "su", "short_factor": [1, 0]}}, "rope_scaling.short_factor is [1, 0]: must"),
        ("Llama", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor is missing: the file is incomplete, get"),
        ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True: only models that look"),
        (
            "Gemma3",
            {"rope_parameters": {"full_attention": {"rope_theta": 0}}},
            "rope_parameters.full_attention.rope_th",
        ),
        (
            "Gemma3",
            {"rope_parameters": {"rope_type": "linear"}},
            "rope_parameters is {'rope_type': 'linear'}: must hold",
        ),
        ("Gemma3", {"rope_scaling": {"type": "linear"}}, "rope_scaling.type is 'linear': transformers reads rope_type"),
        (
            "Gemma3",
            {"rope_parameters": {"full_attention": {"truncate": False}}},
            "rope_parameters.full_attention.truncate is False: transformers reads it for models of one rope alone",
        ),
        (
            "GPTNeoX",
            {"rope_theta": 50.0},
            "rope_theta differs from rotary_emb_base, which counts: leave rope_theta out",
        ),
        ("GPTNeoX", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.type is 'yarn': supported are default, linear"),
        ("Bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact is True: transformers drops biases"),
        ("Llama", {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000000000"),
        ("Llama", {"rope_theta": 10**400}, "rope_theta is 1000000000"),
        ("GPT2", {"n_embd": 2**40}, "n_embd is 1099511627776: must be an integer in [1, "),
        ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True: is not supporte"),
        ("GPTNeoX", {"rotary_pct": 0.01}, "rotary_pct is 0.01: must turn an even number of a head's 128 dimensions"),
        ("GPTNeoX", {"hidden_act": "mish"}, "hidden_act is 'mish': supported are silu, swish, gelu, gelu_new, gelu_f"),
        ("OPT", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False: only norms that h"),
        ("Bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is T"),
        ("Mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9: must be an integer in [1, 8]"),
        ("Qwen3Moe", {"mlp_only_layers": "all"}, "mlp_only_layers is 'all': must be a list of layers' numbers"),
        ("Phi3", {"hidden_act": "gelu"}, "hidden_act is 'gelu': only silu is supported"),
    ],
)
def test_refusals_name_file_and_field(family: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(family, **fields)
    assert caught.value.message.startswith(f"/m/config.json: {message}")
    assert "\n" not in caught.value.message
