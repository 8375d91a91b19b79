"""Llama: parameters named as in Hugging Face checkpoints, arithmetic as in transformers.

Modules are made without memory ("meta" device); `engine.loader` puts the checkpoint's tensors in their places.
https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783.
"""

import torch
from torch import nn
from torch.nn import functional as F

from engine.attention import Attention
from engine.batch import Batch
from engine.model_config import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.models.parallel_layers import (
    ColumnParallelLinear,
    Reduce,
    RowParallelLinear,
    VocabParallelEmbedding,
    times,
)
from engine.parallel.shard import Shard
from engine.rope import angles, inverse_frequencies, rotate


class LlamaForCausalLM(CausalLM):
    def __init__(self, config: ModelConfig, shard: Shard, reduce: Reduce) -> None:
        super().__init__()
        self.lm_head: ColumnParallelLinear | None = None
        with torch.device("meta"):
            self.model = LlamaModel(config, shard, reduce)
            if shard.last_stage and not config.tie_word_embeddings:
                self.lm_head = ColumnParallelLinear(config.hidden_size, shard.vocab, bias=False)
        self.requires_grad_(False)

    @torch.inference_mode()
    def forward(self, batch: Batch, attention: Attention, hidden: torch.Tensor | None = None) -> torch.Tensor:
        output: torch.Tensor = self.model(batch, attention, hidden)
        return output

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.lm_head or self.model.embed_tokens
        assert head is not None
        return F.linear(hidden, head.weight).float()


class LlamaModel(nn.Module):
    """A stage of the model: the first embeds tokens, and the last normalises what the output matrix reads."""

    def __init__(self, config: ModelConfig, shard: Shard, reduce: Reduce) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.embed_tokens: VocabParallelEmbedding | None = None
        if shard.first_stage or (shard.last_stage and config.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(shard.vocab, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {str(layer): LlamaDecoderLayer(config, shard, layer - shard.layers.start, reduce) for layer in shard.layers}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if shard.last_stage else None
        self.attention_scaling = config.rope.attention_scaling
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", inverse_frequencies(config.rope, config.head_dim), persistent=False)
        self._reduce = reduce

    def forward(self, batch: Batch, attention: Attention, hidden: torch.Tensor | None) -> torch.Tensor:
        cos, sin = angles(batch.positions, self.inv_freq, self.attention_scaling)
        if hidden is None:
            assert self.embed_tokens is not None
            hidden = self._reduce(self.embed_tokens(batch.input_ids))
        for layer in self.layers.values():
            hidden = layer(hidden, cos, sin, attention)
        assert hidden is not None
        return hidden if self.norm is None else self.norm(hidden)


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, shard: Shard, layer: int, reduce: Reduce) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, shard, layer)
        self.mlp = LlamaMLP(config, shard)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._reduce = reduce

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
        attended = hidden + self._reduce(self.self_attn(self.input_layernorm(hidden), cos, sin, attention))
        output: torch.Tensor = attended + self._reduce(self.mlp(self.post_attention_layernorm(attended)))
        return output


class LlamaAttention(nn.Module):
    """The attention of some heads.

    Args:
        layer: Counted from the first of this stage.
    """

    def __init__(self, config: ModelConfig, shard: Shard, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        queries, keys = times(shard.heads, config.head_dim), times(shard.kv_heads, config.head_dim)
        bias = config.attention_bias
        self.q_proj = ColumnParallelLinear(config.hidden_size, queries, bias=bias)
        self.k_proj = ColumnParallelLinear(config.hidden_size, keys, bias=bias)
        self.v_proj = ColumnParallelLinear(config.hidden_size, keys, bias=bias)
        self.o_proj = RowParallelLinear(queries, config.hidden_size, bias=bias and shard.tp_rank == 0)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
        num_tokens = len(hidden)
        q = rotate(self.q_proj(hidden).view(num_tokens, -1, self.head_dim), cos, sin)
        k = rotate(self.k_proj(hidden).view(num_tokens, -1, self.head_dim), cos, sin)
        v = self.v_proj(hidden).view(num_tokens, -1, self.head_dim)
        output: torch.Tensor = self.o_proj(attention.attend(self.layer, q, k, v).view(num_tokens, -1))
        return output


class LlamaMLP(nn.Module):
    """Some columns of the MLP."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        super().__init__()
        columns, bias = shard.intermediate, config.mlp_bias
        self.gate_proj = ColumnParallelLinear(config.hidden_size, columns, bias=bias)
        self.up_proj = ColumnParallelLinear(config.hidden_size, columns, bias=bias)
        self.down_proj = RowParallelLinear(columns, config.hidden_size, bias=bias and shard.tp_rank == 0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


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
