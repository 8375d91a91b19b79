"""What Llama and its relatives need for their layers, and what their config files say of that alike."""

from dataclasses import dataclass

from engine.config_fields import Fields
from engine.model_config import LayersConfig, ModelConfig
from engine.models.family import MAX_HEAD_DIM
from engine.rope import MAX_POSITION, RopeConfig


@dataclass(frozen=True, slots=True)
class GatedLayers(LayersConfig):
    """Layers of rotary attention and a gated MLP, each behind an RMS norm.

    Attributes:
        qkv_bias: q, k and v projections have biases.
        output_bias: The o projection has one.
        mlp_bias: gate, up and down projections have biases.
        qk_norm: Each head of q and k is RMS-normalised before it is turned.
        fused: The checkpoint holds q, k and v in one matrix (`qkv_proj`), and gate and up in one (`gate_up_proj`).
    """

    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> "GatedLayers":
        """Of a model that has such layers."""
        assert isinstance(config.layers, cls), f"{config.architecture} has layers of another kind"
        return config.layers


def rms_norm_eps_from_hf(fields: Fields) -> float:
    """What all norms add to a mean square; refuses an MLP that is gated otherwise. Raises ConfigError."""
    if fields.text("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", "only silu is supported")
    return fields.number("rms_norm_eps", 1e-12, 0.1, 1e-6)


def rms_norm_eps_from_gguf(fields: Fields) -> float:
    return fields.number("attention.layer_norm_rms_epsilon", 1e-12, 0.1)


def refuse_partial_rotation(fields: Fields, head_dim: int) -> None:
    """Raises ConfigError where a GGUF file turns but a part of each head."""
    if fields.integer("rope.dimension_count", 1, MAX_HEAD_DIM, head_dim) != head_dim:
        fields.refuse("rope.dimension_count", f"must equal the head dimension, {head_dim}")


def same_windows(fields: Fields, name: str, config: ModelConfig) -> tuple[int | None, ...]:
    """As `ModelConfig.windows`: the field `name` over all layers; absent or 0: none. Raises ConfigError."""
    window = fields.integer(name, 0, MAX_POSITION, 0)
    return _windows(window, [window > 0] * config.num_layers, config)


def chosen_windows(fields: Fields, config: ModelConfig) -> tuple[int | None, ...]:
    """As `ModelConfig.windows`: `sliding_window`, if `use_sliding_window` says so, over the layers that `layer_types`
    names, or those from `max_window_layers` on. Raises ConfigError.
    """
    if not fields.boolean("use_sliding_window", False) or not fields.has("sliding_window"):
        return ()
    types = fields.values.get("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", 0, MAX_POSITION, 28)
        slides = [layer >= first for layer in range(config.num_layers)]
    else:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != config.num_layers or any(kind not in known for kind in types):
            fields.refuse("layer_types", f"must name {' or '.join(known)} for each of {config.num_layers} layers")
        slides = [kind == "sliding_attention" for kind in types]
    return _windows(fields.integer("sliding_window", 1, MAX_POSITION), slides, config)


def _windows(window: int, slides: list[bool], config: ModelConfig) -> tuple[int | None, ...]:
    # What no text outgrows is no window.
    if window >= config.max_position or not any(slides):
        return ()
    return tuple(window if slide else None for slide in slides)
