"""GPT-NeoX, Pythia and their like: attention and MLP side by side, rotation of a part of each head, layer norms.

https://arxiv.org/abs/2204.06745, https://arxiv.org/abs/2304.01373.
"""

from dataclasses import replace

from engine.config_fields import Fields
from engine.decoder_config import AttentionConfig, DecoderLayers, MlpConfig, turns_by
from engine.model_config import ModelConfig
from engine.models.config_parts import activation_from_hf, layer_norm_from_hf
from engine.models.family import Family
from engine.rope import partial_rope_from_hf
from engine.weights.tensor_names import Fused, TensorNames
from pdmesh.errors import ConfigError

_FIELD_NAMES = {"rope_theta": ("rotary_emb_base",), "partial_rotary_factor": ("rotary_pct",)}


def _complete(fields: Fields, config: ModelConfig) -> ModelConfig:
    bias = fields.boolean("attention_bias", True)
    for usual, (own,) in _FIELD_NAMES.items():
        # Files of transformers 4 say both, alike; it reads the family's own.
        if fields.values.get(usual) not in (None, fields.values[own]):
            raise ConfigError(f"{fields.where}: {usual} differs from {own}, which counts: leave {usual} out")
    layers = DecoderLayers(
        norm=layer_norm_from_hf(fields, "layer_norm_eps"),
        positions=turns_by(partial_rope_from_hf(fields, config.head_dim, config.max_position)),
        attention=AttentionConfig(qkv_bias=bias, output_bias=bias),
        mlp=MlpConfig(activation_from_hf(fields, "hidden_act", "gelu"), gated=False, bias=True),
        residual="parallel" if fields.boolean("use_parallel_residual", True) else "pre",
    )
    return replace(config, layers=layers)


FAMILY = Family(
    architecture="GPTNeoXForCausalLM",
    complete=_complete,
    defaults={"rotary_emb_base": 10000, "rotary_pct": 0.25},
    field_names=_FIELD_NAMES,
    names=TensorNames(
        top={
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
        },
        layers="gpt_neox.layers",
        layer={
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        fused=(
            Fused(
                "attention.query_key_value",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                per_head=True,
            ),
        ),
        redundant=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
)
