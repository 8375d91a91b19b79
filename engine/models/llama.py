"""Llama 1 to 3, and what calls itself so: biases only where the config says so.

https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783.
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import AttentionConfig, DecoderLayers, MlpConfig, turns_by
from engine.model_config import ModelConfig
from engine.models.config_parts import (
    refuse_partial_rotation,
    rms_norm_from_gguf,
    rms_norm_from_hf,
    silu_mlp_from_hf,
)
from engine.models.family import Family, GgufFamily, GgufTensorFacts
from engine.rope import rope_from_gguf, rope_from_hf


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    attention_bias = fields.boolean("attention_bias", False)
    layers = DecoderLayers(
        norm=rms_norm_from_hf(fields),
        positions=turns_by(rope_from_hf(fields, config.max_position)),
        attention=AttentionConfig(qkv_bias=attention_bias, output_bias=attention_bias),
        mlp=silu_mlp_from_hf(fields, bias=fields.boolean("mlp_bias", False)),
    )
    return replace(config, layers=layers)


def _complete_gguf(fields: Fields, facts: GgufTensorFacts, config: ModelConfig) -> ModelConfig:
    refuse_partial_rotation(fields, config.head_dim)
    layers = DecoderLayers(
        norm=rms_norm_from_gguf(fields),
        positions=turns_by(rope_from_gguf(fields, config.max_position, facts.rope_freqs)),
        attention=AttentionConfig(qkv_bias=facts.has_attention_bias, output_bias=facts.has_attention_bias),
        mlp=MlpConfig(bias=facts.has_mlp_bias),
    )
    return replace(config, layers=layers)


FAMILY = Family(
    architecture="LlamaForCausalLM",
    complete=_complete,
    gguf=GgufFamily("llama", _complete_gguf, interleaved=True),
)
