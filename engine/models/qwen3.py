"""Qwen3: Llama whose heads of q and k are normalised before they are turned, with a head dimension of its own.

https://arxiv.org/abs/2505.09388.
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import AttentionConfig, DecoderLayers, turns_by
from engine.model_config import ModelConfig
from engine.models.config_parts import (
    chosen_windows,
    refuse_partial_rotation,
    rms_norm_from_gguf,
    rms_norm_from_hf,
    silu_mlp_from_hf,
)
from engine.models.family import Family, GgufFamily, GgufTensorFacts
from engine.rope import rope_from_gguf, rope_from_hf


def complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    """Of Qwen3; Qwen3-MoE has the same beside its experts. Raises ConfigError."""
    attention_bias = fields.boolean("attention_bias", False)
    layers = DecoderLayers(
        norm=rms_norm_from_hf(fields),
        positions=turns_by(rope_from_hf(fields, config.max_position)),
        attention=AttentionConfig(qkv_bias=attention_bias, output_bias=attention_bias, qk_norm=True),
        mlp=silu_mlp_from_hf(fields),
    )
    return replace(config, layers=layers, windows=chosen_windows(fields, config))


def _complete_gguf(fields: Fields, facts: GgufTensorFacts, config: ModelConfig) -> ModelConfig:
    refuse_partial_rotation(fields, config.head_dim)
    layers = DecoderLayers(
        norm=rms_norm_from_gguf(fields),
        positions=turns_by(rope_from_gguf(fields, config.max_position, facts.rope_freqs)),
        attention=AttentionConfig(
            qkv_bias=facts.has_attention_bias, output_bias=facts.has_attention_bias, qk_norm=True
        ),
    )
    return replace(config, layers=layers)


FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    complete=complete,
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    gguf=GgufFamily(
        "qwen3", _complete_gguf, layer_names={"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
    ),
)
