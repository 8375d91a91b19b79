"""The attention of a layer: three maps, norms of heads, rotation, what attention over the cache gives, a map back."""

import torch
from torch import nn

from engine.attention import Attention, Scores
from engine.decoder_config import AlibiPositions, DecoderLayers
from engine.model_config import ModelConfig
from engine.models.norms import make_norm
from engine.models.parallel_layers import ColumnParallelLinear, RowParallelLinear, times
from engine.models.positions import Rotation, alibi_slopes
from engine.parallel.shard import Shard
from engine.rope import rotate


class SelfAttention(nn.Module):
    """The attention of some heads.

    Args:
        layer: Counted from the model's first.
    """

    def __init__(self, config: ModelConfig, shard: Shard, layer: int) -> None:
        super().__init__()
        layers = DecoderLayers.of(config)
        parts = layers.attention
        self.layer = layer - shard.layers.start
        self.head_dim = config.head_dim
        self.scores = scores_of(config, shard, layer)
        queries, keys = times(shard.heads, config.head_dim), times(shard.kv_heads, config.head_dim)
        self.q_proj = ColumnParallelLinear(config.hidden_size, queries, bias=parts.qkv_bias)
        self.k_proj = ColumnParallelLinear(config.hidden_size, keys, bias=parts.qkv_bias)
        self.v_proj = ColumnParallelLinear(config.hidden_size, keys, bias=parts.qkv_bias)
        self.o_proj = RowParallelLinear(queries, config.hidden_size, bias=parts.output_bias and shard.tp_rank == 0)
        self.q_norm = make_norm(layers.norm, config.head_dim) if parts.qk_norm else None
        self.k_norm = make_norm(layers.norm, config.head_dim) if parts.qk_norm else None

    def forward(self, hidden: torch.Tensor, rotation: Rotation | None, attention: Attention) -> torch.Tensor:
        num_tokens = len(hidden)
        q, k, v = (proj(hidden).view(num_tokens, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        attended = attention.attend(self.layer, q, k, v, self.scores)
        output: torch.Tensor = self.o_proj(attended.view(num_tokens, -1))
        return output


def scores_of(config: ModelConfig, shard: Shard, layer: int) -> Scores:
    """How a layer, counted from the model's first, scores keys, of the heads that a shard has."""
    layers = DecoderLayers.of(config)
    slopes: tuple[float, ...] = ()
    if isinstance(layers.positions, AlibiPositions):
        slopes = alibi_slopes(config.num_heads)[shard.heads.start : shard.heads.stop]
    return Scores(
        scale=layers.score_scale(config.head_dim),
        window=config.window(layer),
        soft_cap=layers.attention.soft_cap,
        slopes=slopes,
    )
