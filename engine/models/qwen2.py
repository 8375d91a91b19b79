"""Qwen2 and Qwen2.5: Llama with biases on q, k and v alone, and a window over its upper layers if the config says so.

https://arxiv.org/abs/2407.10671, https://arxiv.org/abs/2412.15115.
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.model_config import ModelConfig
from engine.models.family import Family, GgufFamily, GgufTensorFacts
from engine.models.gated_config import (
    GatedLayers,
    chosen_windows,
    refuse_partial_rotation,
    rms_norm_eps_from_gguf,
    rms_norm_eps_from_hf,
)
from engine.models.gated_decoder import GatedDecoderForCausalLM
from engine.rope import rope_from_gguf, rope_from_hf


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    layers = GatedLayers(
        rms_norm_eps=rms_norm_eps_from_hf(fields), rope=rope_from_hf(fields, config.max_position), qkv_bias=True
    )
    return replace(config, layers=layers, windows=chosen_windows(fields, config))


def _complete_gguf(fields: Fields, facts: GgufTensorFacts, config: ModelConfig) -> ModelConfig:
    refuse_partial_rotation(fields, config.head_dim)
    rope = rope_from_gguf(fields, config.max_position, facts.rope_freqs)
    return replace(config, layers=GatedLayers(rms_norm_eps_from_gguf(fields), rope, qkv_bias=True))


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    build=GatedDecoderForCausalLM,
    complete=_complete,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    gguf=GgufFamily("qwen2", _complete_gguf),
)
