"""The decoder that Llama and its relatives are: an embedding, layers alike, a norm, an output matrix.

Modules are made without memory ("meta" device); `engine.loader` puts the checkpoint's tensors in their places.
"""

import torch
from torch import nn

from engine.attention import Attention
from engine.batch import Batch
from engine.model_config import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.models.gated_config import GatedLayers
from engine.models.layers import DecoderLayer, RMSNorm
from engine.models.parallel_layers import ColumnParallelLinear, Reduce, VocabParallelEmbedding, weight_of
from engine.parallel.shard import Shard
from engine.rope import angles, inverse_frequencies
from engine.weights.quantized import linear


class GatedDecoderForCausalLM(CausalLM):
    """A model whose config has `GatedLayers`."""

    def __init__(self, config: ModelConfig, shard: Shard, reduce: Reduce) -> None:
        super().__init__()
        self.lm_head: ColumnParallelLinear | None = None
        with torch.device("meta"):
            self.model = GatedDecoder(config, shard, reduce)
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
        return linear(hidden, weight_of(head)).float()


class GatedDecoder(nn.Module):
    """A stage of the model: the first embeds tokens, and the last normalises what the output matrix reads."""

    def __init__(self, config: ModelConfig, shard: Shard, reduce: Reduce) -> None:
        super().__init__()
        layers = GatedLayers.of(config)
        self.hidden_size = config.hidden_size
        self.embed_tokens: VocabParallelEmbedding | None = None
        if shard.first_stage or (shard.last_stage and config.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(shard.vocab, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(layer): DecoderLayer(config, shard, layer, reduce) for layer in shard.layers})
        self.norm = RMSNorm(config.hidden_size, layers.rms_norm_eps) if shard.last_stage else None
        self.rotary_dim = layers.rope.rotary_dim(config.head_dim)
        self.attention_scaling = layers.rope.attention_scaling
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", inverse_frequencies(layers.rope, config.head_dim), persistent=False)
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
