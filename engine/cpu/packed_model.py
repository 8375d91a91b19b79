"""A model's matrices as the kernels read them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import torch
from torch import nn

from engine.cpu.packing import PackedMatrix, Packer
from engine.cpu.row_norms import row_norm
from engine.decoder_config import DecoderLayers, RotaryPositions
from engine.model_config import ModelConfig
from engine.models.decoder import DecoderForCausalLM
from engine.models.decoder_layer import DecoderLayer
from engine.models.experts import Mixture
from engine.models.mlp import MLP
from engine.models.parallel_layers import VocabParallelEmbedding, format_of
from engine.models.self_attention import SelfAttention
from engine.weights.offload_file import FileMemory
from engine.weights.weight_file import WeightFile

_NOTHING: Final[Mapping[str, FileMemory]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class PackedMlp:
    """Of an MLP: gate and up interleaved, or up alone, and the map down."""

    up: PackedMatrix
    down: PackedMatrix

    @property
    def num_weights(self) -> int:
        return self.up.num_weights + self.down.num_weights

    @property
    def matrices(self) -> tuple[PackedMatrix, ...]:
        return self.up, self.down


@dataclass(frozen=True, slots=True)
class PackedMixture:
    """Of a mixture of MLPs: the router, and the experts' matrices, one after the other.

    Attributes:
        num_chosen: Of the experts, for each token.
        whole: The shares of those chosen add up to 1.
    """

    router: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix
    num_experts: int
    num_chosen: int
    whole: bool

    @property
    def num_weights(self) -> int:
        """That one token is multiplied with."""
        of_experts = self.up.num_weights + self.down.num_weights
        return self.router.num_weights + of_experts * self.num_chosen // self.num_experts

    @property
    def matrices(self) -> tuple[PackedMatrix, ...]:
        return self.router, self.up, self.down


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """Of one layer: q, k and v side by side, the output map, and the MLP.

    Attributes:
        head_scales: Of `Packer.head_scales`, where heads of q and k are normalised.
    """

    qkv: PackedMatrix
    head_scales: torch.Tensor | None
    output: PackedMatrix
    mlp: PackedMlp | PackedMixture

    @property
    def num_weights(self) -> int:
        """That one token is multiplied with."""
        return self.qkv.num_weights + self.output.num_weights + self.mlp.num_weights

    @property
    def matrices(self) -> tuple[PackedMatrix, ...]:
        return self.qkv, self.output, *self.mlp.matrices


@dataclass(frozen=True, slots=True)
class PackedModel:
    """Of a model, or of what a shard is of one.

    Attributes:
        embedding: Of the tokens, at the first stage, and at the last one where that is the output matrix too.
        project_in: From the embedding's size to the hidden size, where they differ, at the first stage.
        project_out: Back, at the last stage.
        lm_head: At the last stage.
        waiting: In the order of their use, the modules whose matrices lie in a file, and the memory where it is mapped.
    """

    embedding: PackedMatrix | None
    project_in: PackedMatrix | None
    layers: tuple[PackedLayer, ...]
    project_out: PackedMatrix | None
    lm_head: PackedMatrix | None
    waiting: Mapping[str, tuple[memoryview, ...]] = field(default_factory=dict)

    @property
    def matrices(self) -> tuple[PackedMatrix, ...]:
        """All of them, each once."""
        of_layers = [matrix for layer in self.layers for matrix in layer.matrices]
        output = None if self.lm_head is self.embedding else self.lm_head
        others = (self.embedding, self.project_in, self.project_out, output)
        return (*of_layers, *(matrix for matrix in others if matrix is not None))

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """That the kernels read."""
        return tuple(dict.fromkeys(file for matrix in self.matrices for file in matrix.files))

    @property
    def mapped_bytes(self) -> int:
        """Of matrices that lie in these files and are to stay in memory."""
        return sum(matrix.mapped_bytes for matrix in self.matrices if matrix.files)


def pack_model(
    model: DecoderForCausalLM, config: ModelConfig, packer: Packer, waiting: Mapping[str, FileMemory] = _NOTHING
) -> PackedModel:
    """Packs the model's matrices, which it loses.

    Args:
        waiting: The modules whose matrices are to lie in a file.

    Raises ConfigError where a checkpoint cannot give one of them.
    """
    decoder, layers = model.model, DecoderLayers.of(config)
    embedding = _packed_or_none(packer, decoder.embed_tokens)
    packed_layers = []
    for index, layer in decoder.layers.items():
        assert isinstance(layer, DecoderLayer)
        with packer.into(waiting.get(f"model.layers.{index}")):
            packed_layers.append(_packed_layer(layer, packer, _rotary_dim(config, int(index)), layers))
    with packer.into(waiting.get("lm_head")):
        lm_head = embedding if model.lm_head is None else _packed(packer, model.lm_head)
    # A stage that is not the last has neither of these, and its embedding is none that logits need.
    return PackedModel(
        embedding=embedding,
        project_in=_packed_or_none(packer, decoder.project_in),
        layers=tuple(packed_layers),
        project_out=_packed_or_none(packer, decoder.project_out),
        lm_head=lm_head,
        waiting={name: memory.pieces for name, memory in waiting.items()},
    )


def _rotary_dim(config: ModelConfig, layer: int) -> int:
    positions = DecoderLayers.of(config).positions
    if not isinstance(positions, RotaryPositions):
        return config.head_dim
    return positions.tables[positions.table(layer)].rotary_dim(config.head_dim)


def _packed_layer(layer: DecoderLayer, packer: Packer, rotary_dim: int, layers: DecoderLayers) -> PackedLayer:
    attention = layer.self_attn
    projections = _taken(attention.q_proj, attention.k_proj, attention.v_proj)
    return PackedLayer(
        qkv=packer.rotary(*projections, attention.head_dim, rotary_dim),
        head_scales=_head_scales(attention, packer, rotary_dim),
        output=_packed(packer, attention.o_proj),
        mlp=_packed_mlp(layer.mlp, packer) if isinstance(layer.mlp, MLP) else _packed_mixture(layer.mlp, packer),
    )


def _head_scales(attention: SelfAttention, packer: Packer, rotary_dim: int) -> torch.Tensor | None:
    if attention.q_norm is None or attention.k_norm is None:
        return None
    norms = [row_norm(norm) for norm in (attention.q_norm, attention.k_norm)]
    assert not any(norm.centred for norm in norms), "heads are brought to unit root mean square"
    return packer.head_scales([norm.scale for norm in norms], rotary_dim)


def _packed_mlp(mlp: MLP, packer: Packer) -> PackedMlp:
    if mlp.gate_proj is None:
        up = _packed(packer, mlp.up_proj)
    else:
        up = packer.interleaved(*_taken(mlp.gate_proj, mlp.up_proj))
    return PackedMlp(up, _packed(packer, mlp.down_proj))


def _packed_mixture(mixture: Mixture, packer: Packer) -> PackedMixture:
    (router,), _ = _taken(mixture.gate)
    experts = [expert for expert in mixture.experts if isinstance(expert, MLP)]
    ups = [_taken(*(proj for proj in (expert.gate_proj, expert.up_proj) if proj is not None))[0] for expert in experts]
    downs = [_taken(expert.down_proj)[0] for expert in experts]
    return PackedMixture(
        router=packer.side_by_side([router], [None]),
        up=packer.stacked(ups),
        down=packer.stacked(downs),
        num_experts=len(experts),
        num_chosen=mixture.gate.num_per_token,
        whole=mixture.gate.renormalise,
    )


def _packed(packer: Packer, *modules: nn.Linear | VocabParallelEmbedding) -> PackedMatrix:
    (weight_format,) = {format_of(module, packer.weight_format) for module in modules}
    return packer.side_by_side(*_taken(*modules), weight_format)


def _packed_or_none(packer: Packer, module: nn.Linear | VocabParallelEmbedding | None) -> PackedMatrix | None:
    return None if module is None else _packed(packer, module)


def _taken(*modules: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Weights and biases, which the modules lose: they compute nothing."""
    weights: list[torch.Tensor] = [module.get_parameter("weight") for module in modules]
    biases: list[torch.Tensor | None] = [module.bias if isinstance(module, nn.Linear) else None for module in modules]
    for module in modules:
        module.register_parameter("weight", None)
    return weights, biases
