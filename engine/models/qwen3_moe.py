"""Qwen3-MoE: Qwen3 with a mixture of small experts in place of the MLP, in all layers or in some.

https://arxiv.org/abs/2505.09388.
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import DecoderLayers, ExpertsConfig
from engine.model_config import ModelConfig
from engine.models import qwen3
from engine.models.config_parts import MAX_EXPERTS, same_windows
from engine.models.family import MAX_INTERMEDIATE_SIZE, Family


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    config = qwen3.complete(fields, config)
    num_experts = fields.integer("num_experts", 1, MAX_EXPERTS)
    experts = ExpertsConfig(
        num_experts=num_experts,
        num_per_token=fields.integer("num_experts_per_tok", 1, num_experts),
        renormalise=fields.boolean("norm_topk_prob", False),
        intermediate_size=fields.integer("moe_intermediate_size", 1, MAX_INTERMEDIATE_SIZE),
        layers=_layers(fields, config.num_layers),
    )
    slides = fields.boolean("use_sliding_window", False)
    windows = same_windows(fields, "sliding_window", config) if slides else ()
    return replace(config, layers=replace(DecoderLayers.of(config), experts=experts), windows=windows)


def _layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """As `ExpertsConfig.layers`."""
    step = fields.integer("decoder_sparse_step", 1, 2**16, 1)
    dense = fields.value("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        fields.refuse("mlp_only_layers", "must be a list of layers' numbers")
    sparse = tuple((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers))
    return () if all(sparse) else sparse


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    complete=_complete,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    field_names={"num_experts": ("num_local_experts",)},
)
