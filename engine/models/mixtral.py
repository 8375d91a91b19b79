"""Mixtral: Mistral with a mixture of experts in place of each MLP. https://arxiv.org/abs/2401.04088."""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import DecoderLayers, ExpertsConfig
from engine.model_config import ModelConfig
from engine.models import mistral
from engine.models.config_parts import MAX_EXPERTS
from engine.models.family import Family
from engine.weights.tensor_names import TensorNames


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    config = mistral.complete(fields, config)
    num_experts = fields.integer("num_local_experts", 1, MAX_EXPERTS)
    experts = ExpertsConfig(
        num_experts=num_experts,
        num_per_token=fields.integer("num_experts_per_tok", 1, num_experts),
        renormalise=True,
        intermediate_size=config.intermediate_size,
    )
    return replace(config, layers=replace(DecoderLayers.of(config), experts=experts))


FAMILY = Family(
    architecture="MixtralForCausalLM",
    complete=_complete,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    field_names={"num_local_experts": ("num_experts",)},
    names=TensorNames(
        layer={
            "mlp.gate": "block_sparse_moe.gate",
            "mlp.experts.{}.gate_proj": "block_sparse_moe.experts.{}.w1",
            "mlp.experts.{}.up_proj": "block_sparse_moe.experts.{}.w3",
            "mlp.experts.{}.down_proj": "block_sparse_moe.experts.{}.w2",
        }
    ),
)
