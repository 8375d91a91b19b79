"""Qwen2 and Qwen2.5: Llama with biases on q, k and v alone, and a window over its upper layers if the config says so.

https://arxiv.org/abs/2407.10671, https://arxiv.org/abs/2412.15115.
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

_ATTENTION = AttentionConfig(qkv_bias=True)


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    layers = DecoderLayers(
        norm=rms_norm_from_hf(fields),
        positions=turns_by(rope_from_hf(fields, config.max_position)),
        attention=_ATTENTION,
        mlp=silu_mlp_from_hf(fields),
    )
    return replace(config, layers=layers, windows=chosen_windows(fields, config))


def _complete_gguf(fields: Fields, facts: GgufTensorFacts, config: ModelConfig) -> ModelConfig:
    refuse_partial_rotation(fields, config.head_dim)
    rope = rope_from_gguf(fields, config.max_position, facts.rope_freqs)
    return replace(config, layers=DecoderLayers(rms_norm_from_gguf(fields), turns_by(rope), _ATTENTION))


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    complete=_complete,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    gguf=GgufFamily("qwen2", _complete_gguf),
)
