"""Gemma 2: norms on both sides of attention and MLP, scores and logits softly capped, windows in every other layer.

Norms multiply by 1 + their weight, in float32; the embedding is scaled. https://arxiv.org/abs/2408.00118.
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import AttentionConfig, DecoderLayers, EmbeddingConfig, MlpConfig, RotaryPositions, turns_by
from engine.model_config import ModelConfig
from engine.models.config_parts import activation_from_hf, rms_norm_from_hf, sliding_layers, windows_of
from engine.models.family import Family
from engine.rope import MAX_POSITION, rope_from_hf
from engine.weights.tensor_names import TensorNames

# Gemma calls norms after where they lie.
NAMES = TensorNames(
    layer={
        "attention_output_layernorm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "mlp_output_layernorm": "post_feedforward_layernorm",
    }
)


def layers_of(
    fields: Fields, config: ModelConfig, positions: RotaryPositions, score_soft_cap: float | None = None
) -> DecoderLayers:
    """What Gemma 2 and 3 have alike. Raises ConfigError."""
    if fields.has("use_bidirectional_attention") and fields.boolean("use_bidirectional_attention", False):
        fields.refuse("use_bidirectional_attention", "only models that look back are supported")
    attention_bias = fields.boolean("attention_bias", False)
    return DecoderLayers(
        norm=replace(rms_norm_from_hf(fields), from_one=True),
        positions=positions,
        attention=AttentionConfig(
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            score_scale=fields.number("query_pre_attn_scalar", 1e-3, 1e6) ** -0.5,
            soft_cap=score_soft_cap,
        ),
        mlp=MlpConfig(activation_from_hf(fields, "hidden_activation", "gelu_pytorch_tanh")),
        embedding=EmbeddingConfig(scale=config.hidden_size**0.5),
        residual="sandwich",
        logit_soft_cap=_soft_cap(fields, "final_logit_softcapping"),
    )


def windows_over(fields: Fields, config: ModelConfig, slides: tuple[bool, ...]) -> tuple[int | None, ...]:
    """As `ModelConfig.windows`: none where the config has none. Raises ConfigError."""
    return windows_of(fields.integer("sliding_window", 1, MAX_POSITION, MAX_POSITION), slides, config)


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    positions = turns_by(rope_from_hf(fields, config.max_position))
    layers = layers_of(fields, config, positions, _soft_cap(fields, "attn_logit_softcapping"))
    every_other = tuple(layer % 2 == 0 for layer in range(config.num_layers))
    windows = windows_over(fields, config, sliding_layers(fields, config, every_other))
    return replace(config, layers=layers, windows=windows)


def _soft_cap(fields: Fields, name: str) -> float | None:
    return fields.number(name, 1e-3, 1e6) if fields.has(name) else None


FAMILY = Family(
    architecture="Gemma2ForCausalLM",
    complete=_complete,
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    names=NAMES,
)
