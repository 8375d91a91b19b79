"""Gemma 3, text: Gemma 2 with normalised heads of q and k instead of caps, and most layers over windows.

Layers over a window turn by frequencies of their own. https://arxiv.org/abs/2503.19786.
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import RotaryPositions
from engine.model_config import ModelConfig
from engine.models import gemma2
from engine.models.config_parts import sliding_layers
from engine.models.family import Family
from engine.rope import DEFAULT_THETA, MAX_THETA, RopeConfig, rope_from_parameters

_GLOBAL_THETA = 1e6
# One layer in so many sees the whole text.
_PATTERN = 6


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    pattern = fields.integer("sliding_window_pattern", 1, 2**16, _PATTERN)
    slides = sliding_layers(fields, config, tuple(bool((layer + 1) % pattern) for layer in range(config.num_layers)))
    positions = RotaryPositions(_tables(fields, config.max_position), of_layers=tuple(map(int, slides)))
    layers = gemma2.layers_of(fields, config, positions)
    layers = replace(layers, attention=replace(layers.attention, qk_norm=True))
    return replace(config, layers=layers, windows=gemma2.windows_over(fields, config, slides))


def _tables(fields: Fields, max_position: int) -> tuple[RopeConfig, RopeConfig]:
    """Of layers that see the whole text, and of those over a window.

    Each is described in `rope_parameters`, or, as before transformers 5, beside it: the one by `rope_scaling` and
    `rope_theta`, the other by `rope_local_base_freq`. These count where `rope_parameters` do not say.
    """
    none = Fields(fields.where, {})
    parameters = fields.group("rope_parameters") or none
    if parameters.values and not {"full_attention", "sliding_attention"} & parameters.values.keys():
        fields.refuse("rope_parameters", "must hold full_attention and sliding_attention, each with its parameters")
    whole, local = (parameters.group(layers) or none for layers in ("full_attention", "sliding_attention"))
    scaling = fields.group("rope_scaling") or none
    if scaling.has("type") and not scaling.has("rope_type"):
        scaling.refuse("type", "transformers reads rope_type: call it so")
    if scaling.values:
        whole = replace(scaling, values={**whole.values, **scaling.values})
    for of_layers in (whole, local):
        if not of_layers.boolean("truncate", True):
            of_layers.refuse("truncate", "transformers reads it for models of one rope alone: leave it out")
    return (
        rope_from_parameters(whole, max_position, fields.number("rope_theta", 1.0001, MAX_THETA, _GLOBAL_THETA)),
        rope_from_parameters(
            local, max_position, fields.number("rope_local_base_freq", 1.0001, MAX_THETA, DEFAULT_THETA)
        ),
    )


FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    complete=_complete,
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    names=gemma2.NAMES,
)
