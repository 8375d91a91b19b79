"""A decoder as a program of the kernels: the arithmetic of engine/models/decoder.py, operation by operation.

Residuals and sums are float32; what products read, and K and V, are of the weights' dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from engine import decoder_config
from engine.cpu.angles import Angles
from engine.cpu.layer_buffers import LayerBuffers
from engine.cpu.library import Activation, Finish
from engine.cpu.packed_model import PackedLayer, PackedMixture, PackedMlp, PackedModel
from engine.cpu.packing import PackedMatrix
from engine.cpu.program import Program, Rows
from engine.cpu.row_norms import row_norm
from engine.models.decoder import Decoder
from engine.models.decoder_layer import DecoderLayer
from engine.models.norms import Norm
from engine.parallel.shard import Shard

_ACTIVATIONS: Final[Mapping[decoder_config.Activation, Activation]] = {
    "silu": Activation.SILU,
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_tanh": Activation.GELU_TANH,
}


class PartialRows(Protocol):
    """Where ranks that share layers put their partial results for each other, in float32: 3 places, used in turn."""

    def __call__(self, place: int, width: int) -> Rows: ...


@dataclass(frozen=True, slots=True)
class LoweredModel:
    """What a program was made of, beside its operations.

    Attributes:
        residual: What enters at every stage but the first, and leaves at every stage but the last.
        hidden: Where the step's final hidden states come to lie, at the last stage.
        lm_head: From them to logits, at the last stage.
        num_weights: Of the layers, that one token is multiplied with.
    """

    residual: Rows
    hidden: Rows
    lm_head: PackedMatrix | None
    num_weights: int


def lower_decoder(
    decoder: Decoder,
    layers: decoder_config.DecoderLayers,
    packed: PackedModel,
    shard: Shard,
    angles: Sequence[Angles],
    program: Program,
    partial_rows: PartialRows,
    *,
    int8_kv: bool,
) -> LoweredModel:
    """Appends a decoder's operations to `program`.

    Args:
        decoder: Of itself, norms and learned positions are read; its matrices are `packed`.
        layers: What it is made of.
        angles: Of each of its ways to turn; one where positions turn nothing.
        int8_kv: Whether K and V are stored in 8 bits.
    """
    residual = program.rows(decoder.hidden_size, torch.float32)
    if shard.first_stage:
        _lower_embedding(decoder, packed, shard, residual, program, partial_rows)
    # Nobody reads the last layer's results for other tokens than those whose hidden states are wanted.
    wanted = program.rows(decoder.hidden_size, torch.float32).of_outputs() if shard.last_stage else None
    partials = tuple(partial_rows(place, decoder.hidden_size) for place in (0, 1)) if shard.tp_size > 1 else None
    lowering = _LayerLowering(
        program,
        layers,
        residual,
        LayerBuffers.of(packed.layers, decoder.hidden_size, program),
        partials,
        int8_kv=int8_kv,
    )
    positions = layers.positions
    for index, (layer, weights) in enumerate(zip(decoder.layers.values(), packed.layers, strict=True)):
        assert isinstance(layer, DecoderLayer)
        turns = positions.table(shard.layers[index]) if isinstance(positions, decoder_config.RotaryPositions) else 0
        is_last = index == len(decoder.layers) - 1
        program.begin_layer()
        lowering.lower(index, layer, weights, angles[turns], wanted if is_last else None)
    num_weights = sum(weights.num_weights for weights in packed.layers)
    if not shard.last_stage:
        return LoweredModel(residual, residual, None, num_weights)
    lowering.read_residual(decoder.norm)
    hidden = lowering.buffers.normed
    if packed.project_out is not None:
        narrow = program.rows(packed.project_out.n).of_outputs()
        program.project(hidden, packed.project_out, narrow, Finish.NARROW)
        hidden = narrow
    return LoweredModel(residual, hidden, packed.lm_head, num_weights)


def _lower_embedding(
    decoder: Decoder, packed: PackedModel, shard: Shard, residual: Rows, program: Program, partial_rows: PartialRows
) -> None:
    """residual = what enters the first layer."""
    assert packed.embedding is not None
    first_token = shard.vocab.start
    # Transformers rounds it so.
    scale = torch.tensor(decoder.embedding_scale, dtype=program.dtype).item()
    embedded = partial_rows(2, residual.width) if shard.tp_size > 1 else residual
    if packed.project_in is None:
        program.embed(packed.embedding, first_token, embedded, scale)
    else:
        wide, narrow = program.rows(packed.embedding.k, torch.float32), program.rows(packed.embedding.k)
        program.embed(packed.embedding, first_token, wide, scale)
        program.narrow(wide, narrow)
        program.project(narrow, packed.project_in, embedded, Finish.STORE)
    if shard.tp_size > 1:
        # Of each token, one rank's row and the others' zeros.
        program.reduce(embedded, residual, Finish.STORE)
    if decoder.embed_positions is not None:
        program.add_positions(decoder.embed_positions.weight, decoder.embed_positions.offset, residual)
    if decoder.embed_norm is not None:
        program.normalize(residual, row_norm(decoder.embed_norm), residual, Finish.STORE)


class _LayerLowering:
    """Appends layers, one after the other.

    Args:
        residual: What they read and add to.
        partials: Where ranks that share layers put what attention and the MLP add; None: this rank has them alone.
    """

    def __init__(
        self,
        program: Program,
        layers: decoder_config.DecoderLayers,
        residual: Rows,
        buffers: LayerBuffers,
        partials: tuple[Rows, ...] | None,
        *,
        int8_kv: bool,
    ) -> None:
        self.buffers = buffers
        self._program = program
        self._layers = layers
        self._activation = _ACTIVATIONS[layers.mlp.activation]
        self._residual = residual
        self._partials = partials
        self._int8_kv = int8_kv

    def lower(
        self, index: int, layer: DecoderLayer, weights: PackedLayer, angles: Angles, wanted: Rows | None = None
    ) -> None:
        """Appends a layer.

        Args:
            index: Of the KV cache's layers.
            wanted: Of the last layer: where the residual of the tokens goes whose hidden states are wanted; attention
                and what follows compute these alone. None: of all tokens, where it was.
        """
        kind = layer.residual
        self.read_residual(None if kind == "post" else layer.input_layernorm)
        self._project_heads(index, layer, weights, angles)
        if wanted is not None:
            self._program.select(self._residual, wanted)
            self._residual, self.buffers = wanted, self.buffers.of_outputs()
        if kind == "parallel":
            # Before attention is added, and after q, k and v have read what lies there.
            self.read_residual(layer.post_attention_layernorm)
        self._program.attend(index, self.buffers.queries, self.buffers.attended, layer.self_attn.scores)
        target, finish = self._begin_sum(0, layer.attention_output_layernorm)
        self._program.project(self.buffers.attended, weights.output, target, finish)
        self._end_sum(target, layer.attention_output_layernorm)
        if kind == "post":
            self._normalize_residual(layer.input_layernorm)
            self.read_residual(None)
        elif kind != "parallel":
            self.read_residual(layer.post_attention_layernorm)
        target, finish = self._begin_sum(1, layer.mlp_output_layernorm)
        self._mlp_to(weights.mlp, target, finish)
        self._end_sum(target, layer.mlp_output_layernorm)
        if kind == "post":
            self._normalize_residual(layer.post_attention_layernorm)

    def read_residual(self, norm: Norm | None) -> None:
        """normed = the residual's norm, or itself, for products to read."""
        if norm is None:
            self._program.narrow(self._residual, self.buffers.normed)
        else:
            self._program.normalize(self._residual, row_norm(norm), self.buffers.normed)

    def _normalize_residual(self, norm: Norm) -> None:
        self._program.normalize(self._residual, row_norm(norm), self._residual, Finish.STORE)

    def _project_heads(self, index: int, layer: DecoderLayer, weights: PackedLayer, angles: Angles) -> None:
        buffers, program = self.buffers, self._program
        norm = layer.self_attn.q_norm
        if norm is None and not self._int8_kv:
            program.project_heads(buffers.normed, weights.qkv, buffers.queries, index, angles)
            return
        # A head lies over several panels, which several threads may compute: it is normalised, and its K and V get
        # their scales, when all are there.
        program.project(buffers.normed, weights.qkv, buffers.heads, Finish.STORE)
        epsilon = 0.0 if norm is None else norm.eps
        program.finish_heads(buffers.heads, buffers.queries, index, angles, weights.head_scales, epsilon)

    def _mlp_to(self, mlp: PackedMlp | PackedMixture, target: Rows, finish: Finish) -> None:
        """target = this rank's part of what the MLP gives, or that on top of what is there."""
        program, buffers, activation = self._program, self.buffers, self._activation
        activate = Finish.ACTIVATE_MULTIPLY if self._layers.mlp.gated else Finish.ACTIVATE
        if isinstance(mlp, PackedMlp):
            program.project(buffers.normed, mlp.up, buffers.activated, activate, activation)
            program.project(buffers.activated, mlp.down, target, finish)
            return
        experts = buffers.experts
        assert experts is not None
        program.project(buffers.normed, mlp.router, experts.logits, Finish.STORE)
        program.route(experts.logits, mlp.num_experts, mlp.num_chosen, whole=mlp.whole)
        program.gather(buffers.normed, experts.gathered)
        program.project_experts(experts.gathered, mlp.up, mlp.num_experts, experts.activated, activate, activation)
        program.project_experts(experts.activated, mlp.down, mlp.num_experts, experts.sums, Finish.STORE)
        program.combine_experts(experts.sums, target, finish)

    def _begin_sum(self, place: int, norm: Norm | None) -> tuple[Rows, Finish]:
        """Where attention or the MLP puts its part of what is added to the residual, and how."""
        if self._partials is not None:
            partial = self._partials[place]
            return partial.of_outputs() if self._residual.outputs_only else partial, Finish.STORE
        return (self._residual, Finish.ADD) if norm is None else (self.buffers.sums, Finish.STORE)

    def _end_sum(self, target: Rows, norm: Norm | None) -> None:
        """The residual += what all ranks put there, or its norm."""
        if self._partials is not None and norm is None:
            self._program.reduce(target, self._residual, Finish.ADD)
        elif self._partials is not None:
            self._program.reduce(target, self.buffers.sums, Finish.STORE)
        if norm is not None:
            self._program.normalize(self.buffers.sums, row_norm(norm), self._residual, Finish.ADD)
