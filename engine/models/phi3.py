"""Phi-3 and Phi-4-mini: Llama whose checkpoints fuse q, k and v, and gate and up; it may turn but a part of each head.

A model that longrope stretches is served up to the length that it was trained to: there its frequencies are one set,
and beyond it another, which would turn every key of a text anew as it grows past. https://arxiv.org/abs/2404.14219.
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import DecoderLayers, turns_by
from engine.model_config import ModelConfig
from engine.models.config_parts import rms_norm_from_gguf, rms_norm_from_hf, same_windows, silu_mlp_from_hf
from engine.models.family import Family, GgufFamily, GgufTensorFacts
from engine.rope import LongRopeScaling, partial_rope_from_hf, rope_from_gguf
from engine.weights.tensor_names import Fused, TensorNames

# And what it was called at first.
_LONGROPE = ("longrope", "su", "yarn")


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    rope = partial_rope_from_hf(fields, config.head_dim, config.max_position, _LONGROPE)
    max_position = config.max_position
    if isinstance(rope.scaling, LongRopeScaling):
        max_position = min(max_position, rope.scaling.original_max_position)
    config = replace(config, max_position=max_position)
    layers = DecoderLayers(norm=rms_norm_from_hf(fields), positions=turns_by(rope), mlp=silu_mlp_from_hf(fields))
    return replace(config, layers=layers, windows=same_windows(fields, "sliding_window", config))


def _complete_gguf(fields: Fields, facts: GgufTensorFacts, config: ModelConfig) -> ModelConfig:
    rotary_dim = fields.integer("rope.dimension_count", 2, config.head_dim, config.head_dim)
    if rotary_dim % 2:
        fields.refuse("rope.dimension_count", "must be even: rotary embedding turns pairs of dimensions")
    rope = rope_from_gguf(fields, config.max_position, facts.rope_freqs)
    if rotary_dim != config.head_dim:
        rope = replace(rope, num_rotary_dims=rotary_dim)
    layers = DecoderLayers(norm=rms_norm_from_gguf(fields), positions=turns_by(rope))
    return replace(config, layers=layers, windows=same_windows(fields, "attention.sliding_window", config))


_NAMES = TensorNames(
    fused=(
        Fused("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    )
)

FAMILY = Family(
    architecture="Phi3ForCausalLM",
    complete=_complete,
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    names=_NAMES,
    gguf=GgufFamily(
        "phi3",
        _complete_gguf,
        layer_names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        names=_NAMES,
    ),
)
