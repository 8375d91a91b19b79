"""What config files say alike, in several families, of a decoder's parts."""

from typing import Final

from engine.config_fields import Fields
from engine.decoder_config import Activation, MlpConfig, NormConfig
from engine.model_config import ModelConfig
from engine.models.family import MAX_HEAD_DIM
from engine.rope import MAX_POSITION

_ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# Far beyond any model there is.
MAX_EXPERTS: Final = 4096
_FULL, _SLIDING = "full_attention", "sliding_attention"


def rms_norm_from_hf(fields: Fields) -> NormConfig:
    """Raises ConfigError."""
    return NormConfig("rms", fields.number("rms_norm_eps", 1e-12, 0.1, 1e-6))


def rms_norm_from_gguf(fields: Fields) -> NormConfig:
    """Raises ConfigError."""
    return NormConfig("rms", fields.number("attention.layer_norm_rms_epsilon", 1e-12, 0.1))


def layer_norm_from_hf(fields: Fields, name: str) -> NormConfig:
    """Raises ConfigError. The field `name` holds the epsilon."""
    return NormConfig("layer", fields.number(name, 1e-12, 0.1, 1e-5))


def activation_from_hf(fields: Fields, name: str, default: str) -> Activation:
    """What the field `name` calls so. Raises ConfigError."""
    called = fields.text(name, default)
    if called not in _ACTIVATIONS:
        fields.refuse(name, f"supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[called]


def silu_mlp_from_hf(fields: Fields, *, bias: bool = False) -> MlpConfig:
    """A gated MLP. Raises ConfigError where the config asks for another activation than Llama's."""
    if activation_from_hf(fields, "hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", "only silu is supported")
    return MlpConfig(bias=bias)


def refuse_partial_rotation(fields: Fields, head_dim: int) -> None:
    """Raises ConfigError where a GGUF file turns but a part of each head."""
    if fields.integer("rope.dimension_count", 1, MAX_HEAD_DIM, head_dim) != head_dim:
        fields.refuse("rope.dimension_count", f"must equal the head dimension, {head_dim}")


def same_windows(fields: Fields, name: str, config: ModelConfig) -> tuple[int | None, ...]:
    """As `ModelConfig.windows`: the field `name` over all layers; absent or 0: none. Raises ConfigError."""
    window = fields.integer(name, 0, MAX_POSITION, 0)
    return windows_of(window, (window > 0,) * config.num_layers, config)


def chosen_windows(fields: Fields, config: ModelConfig) -> tuple[int | None, ...]:
    """As `ModelConfig.windows`: `sliding_window`, if `use_sliding_window` says so, over the layers that `layer_types`
    names, or those from `max_window_layers` on. Raises ConfigError.
    """
    if not fields.boolean("use_sliding_window", False) or not fields.has("sliding_window"):
        return ()
    first = fields.integer("max_window_layers", 0, MAX_POSITION, 28)
    slides = sliding_layers(fields, config, tuple(layer >= first for layer in range(config.num_layers)))
    return windows_of(fields.integer("sliding_window", 1, MAX_POSITION), slides, config)


def sliding_layers(fields: Fields, config: ModelConfig, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which layers attend over a window: those that `layer_types` names, or `default`. Raises ConfigError."""
    types = fields.value("layer_types")
    if types is None:
        return default
    if (
        not isinstance(types, list)
        or len(types) != config.num_layers
        or any(kind not in (_FULL, _SLIDING) for kind in types)
    ):
        fields.refuse("layer_types", f"must name {_FULL} or {_SLIDING} for each of {config.num_layers} layers")
    return tuple(kind == _SLIDING for kind in types)


def windows_of(window: int, slides: tuple[bool, ...], config: ModelConfig) -> tuple[int | None, ...]:
    """As `ModelConfig.windows`: `window` over the layers that slide."""
    # What no text outgrows is no window.
    if window >= config.max_position or not any(slides):
        return ()
    return tuple(window if slide else None for slide in slides)
