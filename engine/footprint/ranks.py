"""What a rank will hold: its shard of the model, made as the engine makes it, but on torch's "meta" device.

There tensors have shapes and no values: packing, padding and buffers come out as they will be, and nothing is read.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from engine.backend import Way
from engine.config import EngineConfig
from engine.cpu.angles import angles_of
from engine.cpu.library import Kernels
from engine.cpu.lowering import lower_decoder
from engine.cpu.packed_model import pack_model
from engine.cpu.packing import Packer
from engine.cpu.program import Program, Rows
from engine.decoder_config import DecoderLayers, RotaryPositions
from engine.footprint.peak import peak_step_bytes
from engine.loader import DTYPES, weight_bytes, weights_size
from engine.model_config import ModelConfig
from engine.models import build_model
from engine.models.causal_lm import CausalLM
from engine.models.decoder import DecoderForCausalLM
from engine.parallel.shard import Shard
from engine.placement import Placement, place_weights
from engine.runner import PROMPT_LOGITS_ROWS
from engine.weights.quantized import FORMATS, Quantization, WeightFormat

_EMBEDDING = "embed_tokens"
_OUTPUT = "lm_head"
# Angles of these are made, to see what those of any number take.
_FEW_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """As they lie in memory.

    Attributes:
        output: 0 where the embedding is the output matrix too, or another rank has it.
    """

    embedding: int = 0
    layers: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.output


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Of one rank, without its KV cache and its process.

    Attributes:
        buffers_bytes: What steps work in, with as many tokens and requests as the config allows.
    """

    weights: WeightBytes
    buffers_bytes: int


def loaded_bytes(config: EngineConfig, model_config: ModelConfig, shard: Shard) -> int:
    """Of a rank's parameters when they are read, before an executor takes them."""
    model = _model(config, model_config, shard)
    return weights_size(model, DTYPES[config.dtype_name], FORMATS.get(config.quantization))


def placement_of(
    config: EngineConfig, model_config: ModelConfig, shard: Shard, way: Way, device: torch.device
) -> Placement:
    """Where the rank's weights will lie. Raises ConfigError where they do not fit there."""
    if not config.offloads:
        return Placement()
    model = _model(config, model_config, shard)
    return place_weights(
        model,
        config,
        device,
        DTYPES[config.dtype_name],
        FORMATS.get(config.quantization),
        output_waits=way is Way.CPU_KERNELS,
    )


def rank_memory(
    config: EngineConfig, model_config: ModelConfig, shard: Shard, way: Way, max_model_len: int
) -> RankMemory:
    """Of a model of any size, without taking memory.

    Args:
        max_model_len: Tokens of the longest request.
    """
    if way is Way.CPU_KERNELS:
        weights, buffers_bytes = _on_cpu_kernels(config, model_config, shard, max_model_len)
    else:
        model = _model(config, model_config, shard)
        weights = _weights(model, DTYPES[config.dtype_name], FORMATS.get(config.quantization))
        buffers_bytes = peak_step_bytes(config, model_config, shard, model, max_model_len)
    return RankMemory(weights, buffers_bytes + _logits_bytes(config, shard))


def _model(config: EngineConfig, model_config: ModelConfig, shard: Shard) -> CausalLM:
    return build_model(model_config, shard).to(DTYPES[config.dtype_name])


def _weights(model: CausalLM, dtype: torch.dtype, weight_format: WeightFormat | None) -> WeightBytes:
    embedding = layers = output = 0
    for name, num_bytes in weight_bytes(model, dtype, weight_format):
        if name.startswith(_OUTPUT):
            output += num_bytes
        elif _EMBEDDING in name:
            embedding += num_bytes
        else:
            layers += num_bytes
    return WeightBytes(embedding, layers, output)


def _on_cpu_kernels(
    config: EngineConfig, model_config: ModelConfig, shard: Shard, max_model_len: int
) -> tuple[WeightBytes, int]:
    """Packs one layer of each kind, with those between: a large model has many layers, and but a few kinds."""
    kinds = _kinds(model_config, shard)
    firsts = [layers[0] for layers in kinds]
    probe = replace(shard, layers=range(min(firsts), max(firsts) + 1))
    dtype, layers = DTYPES[config.dtype_name], DecoderLayers.of(model_config)
    model = _model(config, model_config, probe)
    assert isinstance(model, DecoderForCausalLM)
    _give_values_to_vectors(model)
    quantization = Quantization(FORMATS.get(config.quantization))
    packed = pack_model(model, model_config, Packer(_NoKernels(dtype), {}, 1, quantization))
    angles = angles_of(layers.positions, model_config.head_dim, _FEW_POSITIONS)
    program = Program(config.max_num_batched_tokens, dtype)

    def partial_rows(place: int, width: int) -> Rows:
        # They lie in memory that the ranks share, each rank's beside the others'.
        return program.rows(width, torch.float32)

    int8_kv = config.kv_cache_dtype == "int8"
    lower_decoder(model.model, layers, packed, probe, angles, program, partial_rows, int8_kv=int8_kv)
    of_layers = sum(
        len(of_kind) * matrix.num_bytes
        for of_kind in kinds
        for matrix in packed.layers[of_kind[0] - probe.layers.start].matrices
    )
    weights = WeightBytes(
        embedding=sum(matrix.num_bytes for matrix in (packed.embedding, packed.project_in) if matrix),
        # With what the kernels read of the model itself: norms and learned positions.
        layers=of_layers + sum(parameter.nbytes for parameter in model.parameters()),
        output=sum(
            matrix.num_bytes
            for matrix in (packed.lm_head, packed.project_out)
            if matrix and matrix is not packed.embedding
        ),
    )
    angles_bytes = sum(each.num_bytes for each in angles)
    if isinstance(layers.positions, RotaryPositions):
        angles_bytes = angles_bytes * max_model_len // _FEW_POSITIONS
    return weights, program.num_bytes + angles_bytes


def _kinds(model_config: ModelConfig, shard: Shard) -> list[list[int]]:
    """The shard's layers, those together that have parameters of the same shapes."""
    kinds: dict[tuple[torch.Size, ...], list[int]] = {}
    for layer in shard.layers:
        # Of no stage that has an embedding or an output.
        one = replace(shard, layers=range(layer, layer + 1), pp_rank=1, pp_size=3)
        shapes = tuple(parameter.shape for parameter in build_model(model_config, one).parameters())
        kinds.setdefault(shapes, []).append(layer)
    return list(kinds.values())


def _give_values_to_vectors(model: CausalLM) -> None:
    """Zeros: packing does more with vectors than with matrices, which stay on "meta"."""
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() == 1:
            owner, _, leaf = name.rpartition(".")
            vector = nn.Parameter(torch.zeros_like(parameter, device="cpu"), requires_grad=False)
            model.get_submodule(owner).register_parameter(leaf, vector)


def _logits_bytes(config: EngineConfig, shard: Shard) -> int:
    """Of as many rows as are asked for at once."""
    if not shard.last_stage:
        return 0
    return max(config.max_num_seqs, PROMPT_LOGITS_ROWS) * len(shard.vocab) * torch.float32.itemsize


class _NoKernels(Kernels):
    """For packing what has no values."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
