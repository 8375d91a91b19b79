"""A layer: attention and an MLP around a residual, in the order that the family has.

Norms are named by what they do, in every family: `input_layernorm` belongs to attention and `post_attention_layernorm`
to the MLP, before them or, in the order "post", after; `attention_output_layernorm` and `mlp_output_layernorm`
normalise what these give before it is added.
"""

import torch
from torch import nn

from engine.attention import Attention
from engine.decoder_config import DecoderLayers
from engine.model_config import ModelConfig
from engine.models.experts import Mixture
from engine.models.mlp import MLP
from engine.models.norms import make_norm
from engine.models.parallel_layers import Reduce
from engine.models.positions import Rotation
from engine.models.self_attention import SelfAttention
from engine.parallel.shard import Shard


class DecoderLayer(nn.Module):
    """One layer, or what a shard has of it.

    Args:
        layer: Counted from the model's first.
    """

    def __init__(self, config: ModelConfig, shard: Shard, layer: int, reduce: Reduce) -> None:
        super().__init__()
        layers, hidden_size = DecoderLayers.of(config), config.hidden_size
        self.residual = layers.residual
        self.self_attn = SelfAttention(config, shard, layer)
        self.mlp: MLP | Mixture
        if layers.experts is not None and layers.experts.in_layer(layer):
            self.mlp = Mixture(layers.experts, layers.mlp, hidden_size, shard.expert_intermediate, shard.tp_rank)
        else:
            self.mlp = MLP(layers.mlp, hidden_size, shard.intermediate, shard.tp_rank)
        self.input_layernorm = make_norm(layers.norm, hidden_size)
        self.post_attention_layernorm = make_norm(layers.norm, hidden_size)
        sandwich = layers.residual == "sandwich"
        self.attention_output_layernorm = make_norm(layers.norm, hidden_size) if sandwich else None
        self.mlp_output_layernorm = make_norm(layers.norm, hidden_size) if sandwich else None
        self._reduce = reduce

    def forward(self, hidden: torch.Tensor, rotation: Rotation | None, attention: Attention) -> torch.Tensor:
        """[T, hidden], of the same. `rotation` is None where positions turn nothing."""
        match self.residual:
            case "pre" | "sandwich":
                attended = self._reduce(self.self_attn(self.input_layernorm(hidden), rotation, attention))
                if self.attention_output_layernorm is not None:
                    attended = self.attention_output_layernorm(attended)
                hidden = hidden + attended
                output = self._reduce(self.mlp(self.post_attention_layernorm(hidden)))
                if self.mlp_output_layernorm is not None:
                    output = self.mlp_output_layernorm(output)
                return hidden + output
            case "post":
                attended = self._reduce(self.self_attn(hidden, rotation, attention))
                hidden = self.input_layernorm(hidden + attended)
                normed: torch.Tensor = self.post_attention_layernorm(hidden + self._reduce(self.mlp(hidden)))
                return normed
            case "parallel":
                attended = self.self_attn(self.input_layernorm(hidden), rotation, attention)
                return hidden + self._reduce(attended + self.mlp(self.post_attention_layernorm(hidden)))
