"""A model's matrices in the order in which the kernels read them."""

from dataclasses import dataclass

import torch
from torch import nn

from engine.cpu.library import Kernels
from engine.cpu.packing import PackedMatrix, Packer
from engine.loader import LoadedModel
from engine.models.gated_decoder import GatedDecoderForCausalLM
from engine.models.layers import DecoderLayer
from engine.models.parallel_layers import VocabParallelEmbedding


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """Of one layer: q, k and v side by side, the output map, gate and up interleaved, and the map down.

    Attributes:
        head_scales: Of `Packer.head_scales`, where heads of q and k are normalised.
    """

    qkv: PackedMatrix
    head_scales: torch.Tensor | None
    output: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix

    @property
    def num_weights(self) -> int:
        return sum(matrix.n * matrix.k for matrix in (self.qkv, self.output, self.gate_up, self.down))


@dataclass(frozen=True, slots=True)
class PackedModel:
    """Of a model, or of what a shard is of one.

    Attributes:
        embedding: Of the tokens, at the first stage, and at the last one where that is the output matrix too.
        lm_head: At the last stage.
    """

    embedding: PackedMatrix | None
    layers: tuple[PackedLayer, ...]
    lm_head: PackedMatrix | None


def pack_model(loaded: LoadedModel, kernels: Kernels, *, num_threads: int) -> PackedModel:
    """Reads the model's matrices, which are still in the checkpoint, straight into their places.

    The model loses them. Raises ConfigError where the checkpoint cannot give one of them.
    """
    model, packer = loaded.model, Packer(kernels, loaded.stored, num_threads)
    assert isinstance(model, GatedDecoderForCausalLM)
    decoder = model.model
    embedding = None if decoder.embed_tokens is None else _packed(packer, decoder.embed_tokens)
    layers = tuple(_packed_layer(layer, packer, decoder.rotary_dim) for layer in decoder.layers.values())
    if decoder.norm is None:
        return PackedModel(embedding, layers, None)
    return PackedModel(embedding, layers, embedding if model.lm_head is None else _packed(packer, model.lm_head))


def _packed_layer(layer: nn.Module, packer: Packer, rotary_dim: int) -> PackedLayer:
    assert isinstance(layer, DecoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    projections = _taken(attention.q_proj, attention.k_proj, attention.v_proj)
    norms = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    return PackedLayer(
        qkv=packer.rotary(*projections, attention.head_dim, rotary_dim),
        head_scales=packer.head_scales([norm.weight for norm in norms], rotary_dim) if norms else None,
        output=_packed(packer, attention.o_proj),
        gate_up=packer.interleaved(*_taken(mlp.gate_proj, mlp.up_proj)),
        down=_packed(packer, mlp.down_proj),
    )


def _packed(packer: Packer, *modules: nn.Linear | VocabParallelEmbedding) -> PackedMatrix:
    return packer.side_by_side(*_taken(*modules))


def _taken(*modules: nn.Linear | VocabParallelEmbedding) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Weights and biases, which the modules lose: they compute nothing."""
    weights = [module.weight for module in modules]
    biases: list[torch.Tensor | None] = [module.bias if isinstance(module, nn.Linear) else None for module in modules]
    for module in modules:
        module.register_parameter("weight", None)
    return weights, biases
