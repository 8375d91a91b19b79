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
from engine.rope import angles, inverse_frequencies, rotate


class LlamaForCausalLM(CausalLM):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.lm_head: nn.Linear | None = None
        with torch.device("meta"):
            self.model = LlamaModel(config)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.requires_grad_(False)

    @torch.inference_mode()
    def forward(self, batch: Batch, attention: Attention) -> torch.Tensor:
        hidden: torch.Tensor = self.model(batch, attention)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, weight).float()


class LlamaModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Not by the constructor: for initial values, which nobody reads, it imports torch's compiler, and that takes
        # a second.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention_scaling = config.rope.attention_scaling
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", inverse_frequencies(config.rope, config.head_dim), persistent=False)

    def forward(self, batch: Batch, attention: Attention) -> torch.Tensor:
        cos, sin = angles(batch.positions, self.inv_freq, self.attention_scaling)
        hidden: torch.Tensor = self.embed_tokens(batch.input_ids)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, attention)
        normed: torch.Tensor = self.norm(hidden)
        return normed


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
        attended: torch.Tensor = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, attention)
        output: torch.Tensor = attended + self.mlp(self.post_attention_layernorm(attended))
        return output


class LlamaAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
        num_tokens = len(hidden)
        q = rotate(self.q_proj(hidden).view(num_tokens, -1, self.head_dim), cos, sin)
        k = rotate(self.k_proj(hidden).view(num_tokens, -1, self.head_dim), cos, sin)
        v = self.v_proj(hidden).view(num_tokens, -1, self.head_dim)
        output: torch.Tensor = self.o_proj(attention.attend(self.layer, q, k, v).view(num_tokens, -1))
        return output


class LlamaMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

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
