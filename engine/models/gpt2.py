"""GPT-2: learned positions, layer norms and biases everywhere, a plain MLP, matrices stored [inputs, outputs].

https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import AttentionConfig, DecoderLayers, LearnedPositions, MlpConfig
from engine.model_config import ModelConfig
from engine.models.config_parts import activation_from_hf, layer_norm_from_hf
from engine.models.family import Family
from engine.weights.tensor_names import Fused, TensorNames


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if fields.boolean(name, False):
            fields.refuse(name, "is not supported: take a model that has it false, as OpenAI's have")
    scaled = fields.boolean("scale_attn_weights", True)
    layers = DecoderLayers(
        norm=layer_norm_from_hf(fields, "layer_norm_epsilon"),
        positions=LearnedPositions(),
        attention=AttentionConfig(qkv_bias=True, output_bias=True, score_scale=None if scaled else 1.0),
        mlp=MlpConfig(activation_from_hf(fields, "activation_function", "gelu_new"), gated=False, bias=True),
    )
    return replace(config, layers=layers)


FAMILY = Family(
    architecture="GPT2LMHeadModel",
    complete=_complete,
    defaults={"n_positions": 1024, "tie_word_embeddings": True},
    field_names={
        "hidden_size": ("n_embd",),
        "intermediate_size": ("n_inner",),
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "max_position_embeddings": ("n_positions",),
    },
    intermediate_ratio=4,
    names=TensorNames(
        top={
            "model.embed_tokens": "transformer.wte",
            "model.embed_positions": "transformer.wpe",
            "model.norm": "transformer.ln_f",
        },
        layers="transformer.h",
        layer={
            "input_layernorm": "ln_1",
            "self_attn.o_proj": "attn.c_proj",
            "post_attention_layernorm": "ln_2",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        fused=(Fused("attn.c_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),),
        transposed=True,
        # OpenAI's own have none.
        optional_prefix="transformer.",
        redundant=(".attn.bias", ".attn.masked_bias"),
    ),
)
