"""A decoder as a program of the kernels: the arithmetic of engine/models/layers.py, operation by operation."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from engine.cpu.library import Finish
from engine.cpu.packing import PackedMatrix, Packer
from engine.cpu.program import Program, Rows
from engine.models.gated_decoder import GatedDecoderForCausalLM
from engine.models.layers import DecoderLayer
from engine.models.parallel_layers import VocabParallelEmbedding
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
    model: GatedDecoderForCausalLM, shard: Shard, program: Program, packer: Packer, partial_rows: PartialRows
) -> LoweredModel:
    """Packs the model's weights, taking each out of the model, and appends its operations to `program`."""
    decoder = model.model
    embedding = None if decoder.embed_tokens is None else _packed(packer, decoder.embed_tokens)
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
    for index, layer in enumerate(decoder.layers.values()):
        assert isinstance(layer, DecoderLayer)
        weights = _LayerWeights.taken(layer, packer, decoder.rotary_dim)
        num_weights += weights.num_weights
        buffers = buffers or _LayerBuffers.for_weights(weights, program)
        program.rms_norm(residual, layer.input_layernorm.weight, layer.input_layernorm.eps, normed)
        attention = layer.self_attn
        if weights.head_scales is None:
            program.project(normed, weights.qkv, buffers.queries, Finish.ROTATE, layer=index)
        else:
            # A head lies over several panels, which several threads may compute: it is normalised when all are there.
            program.project(normed, weights.qkv, buffers.sums, Finish.STORE)
            assert attention.q_norm is not None
            program.normalize_heads(buffers.sums, weights.head_scales, attention.q_norm.eps, buffers.queries, index)
        if shard.last_stage and index == len(decoder.layers) - 1:
            # Nobody reads the last layer's results for other tokens than those whose hidden states are wanted.
            wanted = program.rows(width, torch.float32).of_outputs()
            program.select(residual, wanted)
            residual, normed, buffers = wanted, normed.of_outputs(), buffers.of_outputs()
        program.attend(index, buffers.queries, buffers.attended, attention.window)
        add(buffers.attended, weights.output, 0)
        norm = layer.post_attention_layernorm
        program.rms_norm(residual, norm.weight, norm.eps, normed)
        program.project(normed, weights.gate_up, buffers.activated, Finish.SILU_MULTIPLY)
        add(buffers.activated, weights.down, 1)
    if decoder.norm is None:
        return LoweredModel(whole_residual, whole_residual, None, num_weights)
    program.rms_norm(residual, decoder.norm.weight, decoder.norm.eps, normed)
    lm_head = embedding if model.lm_head is None else _packed(packer, model.lm_head)
    return LoweredModel(whole_residual, normed, lm_head, num_weights)


@dataclass(frozen=True, slots=True)
class _LayerWeights:
    qkv: PackedMatrix
    head_scales: torch.Tensor | None
    output: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix

    @property
    def num_weights(self) -> int:
        return sum(matrix.n * matrix.k for matrix in (self.qkv, self.output, self.gate_up, self.down))

    @staticmethod
    def taken(layer: DecoderLayer, packer: Packer, rotary_dim: int) -> "_LayerWeights":
        attention, mlp = layer.self_attn, layer.mlp
        projections = _taken(attention.q_proj, attention.k_proj, attention.v_proj)
        norms = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
        return _LayerWeights(
            qkv=packer.rotary(*projections, attention.head_dim, rotary_dim),
            head_scales=packer.head_scales([norm.weight for norm in norms], rotary_dim) if norms else None,
            output=_packed(packer, attention.o_proj),
            gate_up=packer.interleaved(*_taken(mlp.gate_proj, mlp.up_proj)),
            down=_packed(packer, mlp.down_proj),
        )


@dataclass(frozen=True, slots=True)
class _LayerBuffers:
    """What one layer hands from operation to operation; all layers use the same memory.

    Attributes:
        sums: Of q, k and v, where heads are normalised.
    """

    sums: Rows
    queries: Rows
    attended: Rows
    activated: Rows

    def of_outputs(self) -> "_LayerBuffers":
        """With what comes after attention for the wanted tokens alone."""
        return replace(self, attended=self.attended.of_outputs(), activated=self.activated.of_outputs())

    @staticmethod
    def for_weights(weights: _LayerWeights, program: Program) -> "_LayerBuffers":
        return _LayerBuffers(
            # Memory that nobody writes costs nothing.
            sums=program.rows(weights.qkv.n, torch.float32),
            queries=program.rows(weights.output.k),
            attended=program.rows(weights.output.k),
            activated=program.rows(weights.down.k),
        )


def _packed(packer: Packer, *modules: nn.Linear | VocabParallelEmbedding) -> PackedMatrix:
    return packer.side_by_side(*_taken(*modules))


def _taken(*modules: nn.Linear | VocabParallelEmbedding) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Weights and biases, which the modules lose: what is packed need not lie in memory twice."""
    weights = [module.weight.data for module in modules]
    biases: list[torch.Tensor | None] = [module.bias if isinstance(module, nn.Linear) else None for module in modules]
    for module in modules:
        module.register_parameter("weight", None)
    return weights, biases
