"""BLOOM: ALiBi instead of positions, a norm behind the embedding, layer norms and biases everywhere, a plain MLP.

It has no length of its own; without one in the config it is served up to 2048 tokens, as it was trained.
https://arxiv.org/abs/2211.05100.
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import AlibiPositions, AttentionConfig, DecoderLayers, EmbeddingConfig, MlpConfig
from engine.model_config import ModelConfig
from engine.models.config_parts import layer_norm_from_hf
from engine.models.family import Family
from engine.weights.tensor_names import Fused, TensorNames


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    if fields.boolean("apply_residual_connection_post_layernorm", False):
        fields.refuse("apply_residual_connection_post_layernorm", "is not supported: take one of BigScience's models")
    if fields.boolean("slow_but_exact", False) and fields.integer("pretraining_tp", 1, 2**16, 1) > 1:
        fields.refuse("slow_but_exact", "transformers drops biases with it: set it to false")
    layers = DecoderLayers(
        norm=layer_norm_from_hf(fields, "layer_norm_epsilon"),
        positions=AlibiPositions(),
        attention=AttentionConfig(qkv_bias=True, output_bias=True),
        mlp=MlpConfig("gelu_tanh", gated=False, bias=True),
        embedding=EmbeddingConfig(norm=True),
    )
    return replace(config, layers=layers)


FAMILY = Family(
    architecture="BloomForCausalLM",
    complete=_complete,
    defaults={"tie_word_embeddings": True},
    field_names={
        "hidden_size": ("n_embed",),
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "max_position_embeddings": ("seq_length",),
    },
    intermediate_ratio=4,
    names=TensorNames(
        top={
            "model.embed_tokens": "transformer.word_embeddings",
            "model.embed_norm": "transformer.word_embeddings_layernorm",
            "model.norm": "transformer.ln_f",
        },
        layers="transformer.h",
        layer={
            "self_attn.o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        fused=(
            Fused(
                "self_attention.query_key_value",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                per_head=True,
            ),
        ),
        # BigScience's own have none.
        optional_prefix="transformer.",
    ),
)
