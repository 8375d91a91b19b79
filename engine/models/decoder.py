"""The decoder that every family is: an embedding, layers alike, a norm, an output matrix.

Modules are made without memory ("meta" device); `engine.loader` puts the checkpoint's tensors in their places. They
have the same names in all families (engine/models/tensor_names.py); arithmetic is that of transformers.
"""

import torch
from torch import nn

from engine.attention import Attention
from engine.batch import Batch
from engine.decoder_config import DecoderLayers, LearnedPositions, RotaryPositions
from engine.model_config import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.models.decoder_layer import DecoderLayer
from engine.models.norms import make_norm
from engine.models.parallel_layers import Reduce, VocabParallelEmbedding, VocabParallelLinear, weight_of
from engine.models.positions import PositionEmbedding, RotaryTable
from engine.parallel.shard import Shard
from engine.weights.quantized import linear


class DecoderForCausalLM(CausalLM):
    """A model, or a stage of it: the first embeds tokens, the last makes logits."""

    def __init__(self, config: ModelConfig, shard: Shard, reduce: Reduce) -> None:
        super().__init__()
        layers = DecoderLayers.of(config)
        self.logit_soft_cap = layers.logit_soft_cap
        self.lm_head: VocabParallelLinear | None = None
        with torch.device("meta"):
            self.model = Decoder(config, shard, reduce)
            if shard.last_stage and not config.tie_word_embeddings:
                self.lm_head = VocabParallelLinear(layers.embedding.size or config.hidden_size, shard.vocab, bias=False)
        self.requires_grad_(False)

    @torch.inference_mode()
    def forward(self, batch: Batch, attention: Attention, hidden: torch.Tensor | None = None) -> torch.Tensor:
        output: torch.Tensor = self.model(batch, attention, hidden)
        return output

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.model.project_out is not None:
            hidden = self.model.project_out(hidden)
        head = self.lm_head or self.model.embed_tokens
        assert head is not None
        logits = linear(hidden, weight_of(head)).float()
        cap = self.logit_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap


class Decoder(nn.Module):
    """A stage up to the norm that the output matrix reads."""

    def __init__(self, config: ModelConfig, shard: Shard, reduce: Reduce) -> None:
        super().__init__()
        layers = DecoderLayers.of(config)
        positions, embedding, hidden_size = layers.positions, layers.embedding, config.hidden_size
        self.hidden_size = hidden_size
        self.embedding_scale = embedding.scale
        self.embed_tokens: VocabParallelEmbedding | None = None
        self.embed_norm = make_norm(layers.norm, hidden_size) if embedding.norm and shard.first_stage else None
        self.embed_positions: PositionEmbedding | None = None
        self.project_in: nn.Linear | None = None
        self.project_out: nn.Linear | None = None
        if shard.first_stage or (shard.last_stage and config.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(shard.vocab, config.vocab_size, embedding.size or hidden_size)
        if shard.first_stage and isinstance(positions, LearnedPositions):
            self.embed_positions = PositionEmbedding(config.max_position, hidden_size, positions.offset)
        if embedding.size is not None:
            # Small, and every rank has them whole.
            self.project_in = nn.Linear(embedding.size, hidden_size, bias=False) if shard.first_stage else None
            self.project_out = nn.Linear(hidden_size, embedding.size, bias=False) if shard.last_stage else None
        self.layers = nn.ModuleDict({str(layer): DecoderLayer(config, shard, layer, reduce) for layer in shard.layers})
        self.norm = make_norm(layers.norm, hidden_size) if shard.last_stage and layers.final_norm else None
        tables = positions.tables if isinstance(positions, RotaryPositions) else ()
        self.rotary_tables = nn.ModuleList(RotaryTable(table, config.head_dim) for table in tables)
        # Of each of `layers`; of none where positions turn nothing.
        self._table_of_layer = (
            [positions.table(layer) for layer in shard.layers] if isinstance(positions, RotaryPositions) else None
        )
        self._reduce = reduce

    def forward(self, batch: Batch, attention: Attention, hidden: torch.Tensor | None) -> torch.Tensor:
        if hidden is None:
            hidden = self._embed(batch)
        rotations = [table(batch.positions) for table in self.rotary_tables]
        for index, layer in enumerate(self.layers.values()):
            rotation = None if self._table_of_layer is None else rotations[self._table_of_layer[index]]
            hidden = layer(hidden, rotation, attention)
        assert hidden is not None
        return hidden if self.norm is None else self.norm(hidden)

    def _embed(self, batch: Batch) -> torch.Tensor:
        """[T, hidden]."""
        assert self.embed_tokens is not None
        hidden = self._reduce(self.embed_tokens(batch.input_ids))
        if self.embedding_scale != 1.0:
            hidden = hidden * torch.tensor(self.embedding_scale, dtype=hidden.dtype)
        if self.project_in is not None:
            hidden = self.project_in(hidden)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(batch.positions)
        return hidden if self.embed_norm is None else self.embed_norm(hidden)
