"""From what a person names to a model that runs: open, check, then fill the parameters one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from engine.model_config import ModelConfig
from engine.models import build_model
from engine.models.causal_lm import CausalLM
from engine.models.parallel_layers import Reduce, alone, is_quantizable
from engine.parallel.shard import Shard, shard_of
from engine.weights.checkpoint import WHOLE, Checkpoint, Part, StoredTensor, part_bytes
from engine.weights.digest import model_digest
from engine.weights.places import TensorPlaces
from engine.weights.quantized import GROUP, QuantizedWeight, Quantizer, WeightFormat
from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Of a matrix that is quantised: read at a time.
_PIECE_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class Split:
    """How a model is split over ranks, and which of them this is; see engine/parallel.

    Attributes:
        reduce: Sums over the ranks that share a layer.
    """

    tp: int = 1
    pp: int = 1
    rank: int = 0
    reduce: Reduce = alone


ALONE = Split()


@dataclass(frozen=True, slots=True)
class Quantization:
    """How matrices are quantised as they are loaded.

    Attributes:
        format: None: not at all.
        quantizer: None: in plain torch.
    """

    format: WeightFormat | None = None
    quantizer: Quantizer | None = None


UNQUANTIZED = Quantization()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, or a rank's shard of one, ready to run, and what tells the model apart (`digest`, 64 hex digits)."""

    model: CausalLM
    config: ModelConfig
    digest: str
    shard: Shard

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def num_bytes(self) -> int:
        """Of the parameters and quantised weights, before an executor takes them."""
        quantized = (module.quantized for module in self.model.modules() if is_quantizable(module))
        num_quantized = sum(weight.nbytes for weight in quantized if weight is not None)
        return num_quantized + sum(parameter.nbytes for parameter in self.model.parameters())


def load_model(
    source: str,
    dtype: str,
    device: torch.device,
    on_progress: Callable[[int, int], None],
    split: Split = ALONE,
    quantization: Quantization = UNQUANTIZED,
) -> LoadedModel:
    """Loads the model that `source` names, or one rank's shard. Takes memory for its parameters and one tensor, or of a
    tensor that is quantised a piece.

    Args:
        source: A Hugging Face model directory, a .gguf file or a Hub id.
        dtype: A key of `DTYPES`: what parameters are converted to, and what the model computes in.
        on_progress: Called with (bytes read, bytes in all), at the start and after each tensor.

    Raises:
        ConfigError: naming the file, the tensor or field, and what to do.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: must be one of {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(source)
    shard = shard_of(checkpoint.config, tp=split.tp, pp=split.pp, rank=split.rank)
    places = _places(checkpoint)
    _check(places, checkpoint)
    model = build_model(checkpoint.config, shard, split.reduce)
    held = _held(model, places)
    # In the order in which reading is fastest.
    wanted = [
        (tensor, name, part) for tensor in checkpoint.tensors.values() for name, part in held.get(tensor.name, ())
    ]
    if quantization.format is not None:
        _check_groups(model, wanted, quantization.format)
    total = sum(part_bytes(tensor, part) for tensor, _, part in wanted)
    done = 0
    on_progress(done, total)
    for tensor, name, part in wanted:
        module, leaf = _owner(model, name)
        if quantization.format is not None and is_quantizable(module) and leaf == "weight":
            quantized = _read_quantized(checkpoint, tensor, part, DTYPES[dtype], quantization)
            module.register_parameter(leaf, None)
            module.quantized = quantized.to(device)
        else:
            values = checkpoint.read(tensor.name, DTYPES[dtype], part)
            module.register_parameter(leaf, nn.Parameter(values.to(device), requires_grad=False))
        done += part_bytes(tensor, part)
        on_progress(done, total)
    # The parameters are there already: this moves what the model computed for itself.
    model.to(device)
    return LoadedModel(model, checkpoint.config, model_digest(checkpoint), shard)


def _places(checkpoint: Checkpoint) -> TensorPlaces:
    """Where the whole model's tensors lie."""
    shapes = {name: tuple(parameter.shape) for name, parameter in build_model(checkpoint.config).named_parameters()}
    return TensorPlaces(checkpoint.names, shapes, checkpoint.config.head_dim, checkpoint.tensors)


def _held(model: nn.Module, places: TensorPlaces) -> dict[str, list[tuple[str, Part]]]:
    """Of each of the checkpoint's tensors: the parameters that it holds, and what of it each is."""
    held: dict[str, list[tuple[str, Part]]] = {}
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        part = getattr(model.get_submodule(owner), "parts", {}).get(leaf, WHOLE)
        tensor, stored_part = places.place(name, part)
        held.setdefault(tensor, []).append((name, stored_part))
    return held


def _check(places: TensorPlaces, checkpoint: Checkpoint) -> None:
    """Raises ConfigError where a parameter of the whole model has no tensor, a tensor no place, or shapes differ."""
    shapes = places.stored_shapes()
    files = ", ".join(str(file) for file in checkpoint.files[:3]) + (", …" if len(checkpoint.files) > 3 else "")
    for name in shapes:
        if name not in checkpoint.tensors:
            raise ConfigError(f"{files}: tensor {name} is missing: get the checkpoint anew, or check its config")
    for tensor in checkpoint.tensors.values():
        if tensor.name in shapes:
            expected = shapes[tensor.name]
            if tensor.shape != expected:
                raise ConfigError(
                    f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, and the config asks for "
                    f"{list(expected)}: get config and weights from the same place"
                )
        elif not places.is_redundant(tensor.name):
            raise ConfigError(
                f"{tensor.file}: tensor {tensor.name} has no place in {checkpoint.config.architecture} with this "
                "config: get config and weights from the same place"
            )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a parameter, and what it calls it."""
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _check_groups(
    model: nn.Module, wanted: Sequence[tuple[StoredTensor, str, Part]], weight_format: WeightFormat
) -> None:
    """Raises ConfigError where a rank's columns cut through a group: its weights would not be those of the whole."""
    for tensor, name, part in wanted:
        module, _ = _owner(model, name)
        if part.columns is None or not is_quantizable(module):
            continue
        columns, num_columns = part.columns, Part(transposed=part.transposed).shape_of(tensor.shape)[1]
        if columns.start % GROUP or (columns.stop % GROUP and columns.stop != num_columns):
            raise ConfigError(
                f"--quantization {weight_format.name} has a scale for each {GROUP} columns, and a rank would hold "
                f"columns {columns.start} to {columns.stop} of {tensor.name}: choose another --tp, or none"
            )


def _read_quantized(
    checkpoint: Checkpoint, tensor: StoredTensor, part: Part, dtype: torch.dtype, quantization: Quantization
) -> QuantizedWeight:
    """A matrix, or a part of one, read and quantised piece by piece."""
    assert quantization.format is not None
    n, k = part.shape_of(tensor.shape)
    quantized = QuantizedWeight.empty(quantization.format, n, k, dtype)
    # Whole heads, which of some tensors alone can be read.
    head_dim = checkpoint.config.head_dim
    rows_each = max(1, _PIECE_VALUES // k // head_dim) * head_dim
    stored = 0
    for run in part.runs_of(tensor.shape):
        for begin in range(0, len(run), rows_each):
            # In float32: what the file's own scales and integers make may be no number of `dtype`.
            piece = replace(part, rows=run[begin : begin + rows_each])
            values = checkpoint.read(tensor.name, torch.float32, piece)
            try:
                quantized.store_rows(stored, values, quantization.quantizer)
            except ConfigError as error:
                raise ConfigError(f"{tensor.file}: tensor {tensor.name} {error}: get the file anew") from error
            stored += len(values)
    return quantized
