"""OPT: learned positions from row 2 on, layer norms, a plain MLP; OPT-350m normalises after, and embeds more narrowly.

https://arxiv.org/abs/2205.01068.
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import (
    AttentionConfig,
    DecoderLayers,
    EmbeddingConfig,
    LearnedPositions,
    MlpConfig,
    NormConfig,
)
from engine.model_config import ModelConfig
from engine.models.config_parts import activation_from_hf
from engine.models.family import MAX_HIDDEN_SIZE, Family
from engine.weights.tensor_names import TensorNames


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    if not fields.boolean("layer_norm_elementwise_affine", True):
        fields.refuse("layer_norm_elementwise_affine", "only norms that have weights are supported")
    before, bias = fields.boolean("do_layer_norm_before", True), fields.boolean("enable_bias", True)
    size = fields.integer("word_embed_proj_dim", 1, MAX_HIDDEN_SIZE, config.hidden_size)
    layers = DecoderLayers(
        norm=NormConfig("layer", 1e-5),
        positions=LearnedPositions(offset=2),
        attention=AttentionConfig(qkv_bias=bias, output_bias=bias),
        mlp=MlpConfig(activation_from_hf(fields, "activation_function", "relu"), gated=False, bias=bias),
        embedding=EmbeddingConfig(size=None if size == config.hidden_size else size),
        residual="pre" if before else "post",
        final_norm=before and not fields.boolean("_remove_final_layer_norm", False),
    )
    return replace(config, layers=layers)


FAMILY = Family(
    architecture="OPTForCausalLM",
    complete=_complete,
    defaults={"tie_word_embeddings": True},
    field_names={"intermediate_size": ("ffn_dim",)},
    names=TensorNames(
        top={
            "model.embed_tokens": "model.decoder.embed_tokens",
            "model.embed_positions": "model.decoder.embed_positions",
            "model.project_in": "model.decoder.project_in",
            "model.project_out": "model.decoder.project_out",
            "model.norm": "model.decoder.final_layer_norm",
        },
        layers="model.decoder.layers",
        layer={
            "input_layernorm": "self_attn_layer_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "post_attention_layernorm": "final_layer_norm",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
        },
        # Meta's own have none.
        optional_prefix="model.",
    ),
)
