"""The layers that Llama and its relatives share: arithmetic as in transformers, parameters named as there.

A family says by `GatedLayers` which of them have biases, norms or a window.
"""

import torch
from torch import nn
from torch.nn import functional as F

from engine.attention import Attention
from engine.model_config import ModelConfig
from engine.models.gated_config import GatedLayers
from engine.models.parallel_layers import ColumnParallelLinear, Reduce, RowParallelLinear, times
from engine.parallel.shard import Shard
from engine.rope import rotate


class RMSNorm(nn.Module):
    """Scales each row to unit root mean square, in float32, then by `weight` in the row's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(hidden.dtype)


class RotaryAttention(nn.Module):
    """The attention of some heads.

    Args:
        layer: Counted from the model's first.
    """

    def __init__(self, config: ModelConfig, shard: Shard, layer: int) -> None:
        super().__init__()
        layers = GatedLayers.of(config)
        self.layer = layer - shard.layers.start
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        queries, keys = times(shard.heads, config.head_dim), times(shard.kv_heads, config.head_dim)
        in_features, bias = config.hidden_size, layers.qkv_bias
        # Where k and v begin in a matrix of all three.
        first_key = config.num_heads * config.head_dim
        first_value = first_key + config.num_kv_heads * config.head_dim
        fused = "qkv_proj" if layers.fused else None
        self.q_proj = ColumnParallelLinear(in_features, queries, bias=bias, fused=fused)
        self.k_proj = ColumnParallelLinear(in_features, keys, bias=bias, fused=fused, first_row=first_key)
        self.v_proj = ColumnParallelLinear(in_features, keys, bias=bias, fused=fused, first_row=first_value)
        self.o_proj = RowParallelLinear(queries, in_features, bias=layers.output_bias and shard.tp_rank == 0)
        self.q_norm = RMSNorm(config.head_dim, layers.rms_norm_eps) if layers.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, layers.rms_norm_eps) if layers.qk_norm else None

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
        num_tokens = len(hidden)
        q, k, v = (proj(hidden).view(num_tokens, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        attended = attention.attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v, self.window)
        output: torch.Tensor = self.o_proj(attended.view(num_tokens, -1))
        return output


class GatedMLP(nn.Module):
    """Some columns of the MLP."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        super().__init__()
        layers, in_features, columns = GatedLayers.of(config), config.hidden_size, shard.intermediate
        fused = "gate_up_proj" if layers.fused else None
        bias, first_up = layers.mlp_bias, config.intermediate_size
        self.gate_proj = ColumnParallelLinear(in_features, columns, bias=bias, fused=fused)
        self.up_proj = ColumnParallelLinear(in_features, columns, bias=bias, fused=fused, first_row=first_up)
        self.down_proj = RowParallelLinear(columns, in_features, bias=bias and shard.tp_rank == 0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual, of which each reads its norm."""

    def __init__(self, config: ModelConfig, shard: Shard, layer: int, reduce: Reduce) -> None:
        super().__init__()
        eps = GatedLayers.of(config).rms_norm_eps
        self.self_attn = RotaryAttention(config, shard, layer)
        self.mlp = GatedMLP(config, shard)
        self.input_layernorm = RMSNorm(config.hidden_size, eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps)
        self._reduce = reduce

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
        attended = hidden + self._reduce(self.self_attn(self.input_layernorm(hidden), cos, sin, attention))
        output: torch.Tensor = attended + self._reduce(self.mlp(self.post_attention_layernorm(attended)))
        return output
