"""Mistral: Llama without biases, and with a sliding window over all layers where the config has one.

GGUF files call it llama, and name no window: from there it runs as one. https://arxiv.org/abs/2310.06825.
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import DecoderLayers, turns_by
from engine.model_config import ModelConfig
from engine.models.config_parts import rms_norm_from_hf, same_windows, silu_mlp_from_hf
from engine.models.family import Family
from engine.rope import rope_from_hf


def complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    """Of Mistral; Mixtral has the same beside its experts. Raises ConfigError."""
    if fields.has("layer_types"):
        fields.refuse("layer_types", "the family has one window for all layers, sliding_window: remove the field")
    layers = DecoderLayers(
        norm=rms_norm_from_hf(fields),
        positions=turns_by(rope_from_hf(fields, config.max_position)),
        mlp=silu_mlp_from_hf(fields),
    )
    return replace(config, layers=layers, windows=same_windows(fields, "sliding_window", config))


FAMILY = Family(
    architecture="MistralForCausalLM",
    complete=complete,
    # Absent, the window is this; models that have none say null.
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
)
