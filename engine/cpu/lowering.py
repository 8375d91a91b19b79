"""A decoder as a program of the kernels: the arithmetic of engine/models/layers.py, operation by operation."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from engine.attention import Scores
from engine.cpu.angles import Angles
from engine.cpu.library import Activation, Finish
from engine.cpu.packed_model import PackedLayer, PackedModel
from engine.cpu.packing import PackedMatrix
from engine.cpu.program import Program, RowNorm, Rows
from engine.models.gated_decoder import GatedDecoderForCausalLM
from engine.models.layers import DecoderLayer, RMSNorm
from engine.parallel.shard import Shard


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
        num_weights: Of the layers.
    """

    residual: Rows
    hidden: Rows
    lm_head: PackedMatrix | None
    num_weights: int


def lower_decoder(
    model: GatedDecoderForCausalLM,
    packed: PackedModel,
    shard: Shard,
    angles: Angles,
    program: Program,
    partial_rows: PartialRows,
    *,
    int8_kv: bool,
) -> LoweredModel:
    """Appends the model's operations to `program`. Its matrices are `packed`; of itself, norms are read."""
    decoder = model.model
    embedding = packed.embedding
    width = decoder.hidden_size
    residual = whole_residual = program.rows(width, torch.float32)
    normed = program.rows(width)
    shared = shard.tp_size > 1
    if shard.first_stage:
        assert embedding is not None
        embedded = partial_rows(2, width) if shared else residual
        program.embed(embedding, shard.vocab.start, embedded)
        if shared:
            program.reduce(embedded, residual, Finish.STORE)
    partials = [partial_rows(place, width) for place in (0, 1)] if shared else []

    def add(source: Rows, matrix: PackedMatrix, place: int) -> None:
        """The residual += source times the matrix, of which each rank has a part."""
        if not shared:
            program.project(source, matrix, residual, Finish.ADD)
            return
        partial = partials[place].of_outputs() if residual.outputs_only else partials[place]
        program.project(source, matrix, partial, Finish.STORE)
        program.reduce(partial, residual, Finish.ADD)

    buffers: _LayerBuffers | None = None
    num_weights = 0
    for index, (layer, weights) in enumerate(zip(decoder.layers.values(), packed.layers, strict=True)):
        assert isinstance(layer, DecoderLayer)
        num_weights += weights.num_weights
        buffers = buffers or _LayerBuffers.for_weights(weights, program)
        program.normalize(residual, _norm(layer.input_layernorm), normed)
        attention = layer.self_attn
        if attention.q_norm is None and not int8_kv:
            program.project_heads(normed, weights.qkv, buffers.queries, index, angles)
        else:
            # A head lies over several panels, which several threads may compute: it is normalised, and its K and V
            # quantised, when all are there.
            program.project(normed, weights.qkv, buffers.sums, Finish.STORE)
            epsilon = 0.0 if attention.q_norm is None else attention.q_norm.eps
            program.finish_heads(buffers.sums, buffers.queries, index, angles, weights.head_scales, epsilon)
        if shard.last_stage and index == len(decoder.layers) - 1:
            # Nobody reads the last layer's results for other tokens than those whose hidden states are wanted.
            wanted = program.rows(width, torch.float32).of_outputs()
            program.select(residual, wanted)
            residual, normed, buffers = wanted, normed.of_outputs(), buffers.of_outputs()
        program.attend(index, buffers.queries, buffers.attended, Scores(attention.head_dim**-0.5, attention.window))
        add(buffers.attended, weights.output, 0)
        program.normalize(residual, _norm(layer.post_attention_layernorm), normed)
        program.project(normed, weights.gate_up, buffers.activated, Finish.ACTIVATE_MULTIPLY, Activation.SILU)
        add(buffers.activated, weights.down, 1)
    if decoder.norm is None:
        return LoweredModel(whole_residual, whole_residual, None, num_weights)
    program.normalize(residual, _norm(decoder.norm), normed)
    return LoweredModel(whole_residual, normed, packed.lm_head, num_weights)


def _norm(norm: RMSNorm) -> RowNorm:
    return RowNorm(norm.weight, norm.eps)


@dataclass(frozen=True, slots=True)
class _LayerBuffers:
    """What one layer hands from operation to operation; all layers use the same memory.

    Attributes:
        sums: Of q, k and v, where heads are needed whole.
    """

    sums: Rows
    queries: Rows
    attended: Rows
    activated: Rows

    def of_outputs(self) -> "_LayerBuffers":
        """With what comes after attention for the wanted tokens alone."""
        return replace(self, attended=self.attended.of_outputs(), activated=self.activated.of_outputs())

    @staticmethod
    def for_weights(weights: PackedLayer, program: Program) -> "_LayerBuffers":
        return _LayerBuffers(
            # Memory that nobody writes costs nothing.
            sums=program.rows(weights.qkv.n, torch.float32),
            queries=program.rows(weights.output.k),
            attended=program.rows(weights.output.k),
            activated=program.rows(weights.down.k),
        )
