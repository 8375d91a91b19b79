"""From what a person names to a model that runs: open, check, then fill the parameters one by one.

Matrices that are to be packed stay in the checkpoint; their packer reads them straight into their places.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from engine.config import available_memory_bytes
from engine.model_config import ModelConfig
from engine.models import build_model
from engine.models.causal_lm import CausalLM
from engine.models.parallel_layers import Reduce, alone, format_of, is_quantizable
from engine.parallel.shard import Shard, shard_of
from engine.weights.checkpoint import WHOLE, Checkpoint, Part, part_bytes
from engine.weights.digest import model_digest
from engine.weights.places import TensorPlaces
from engine.weights.quantized import UNQUANTIZED, Quantization, WeightFormat
from engine.weights.source import open_checkpoint
from engine.weights.stored import Progress, StoredMatrix
from pdmesh.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
class LoadedModel:
    """A model, or a rank's shard of one, ready to run but for the matrices that are `stored`.

    Attributes:
        digest: What tells the model apart: 64 hex digits.
        dtype: What it computes in.
        num_bytes: Of the parameters, before an executor takes them.
        model_bytes: Of those of the whole model, likewise.
        stored: The parameters that have no values yet. Whoever packs one takes it out.
    """

    model: CausalLM
    config: ModelConfig
    digest: str
    shard: Shard
    dtype: torch.dtype
    num_bytes: int
    model_bytes: int
    stored: dict[torch.Tensor, StoredMatrix] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.config.name

    def fill(self, device: torch.device) -> None:
        """Reads what is still stored into the model. Raises ConfigError."""
        for module in self.model.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if matrix := self.stored.pop(parameter, None):
                    _assign(module, leaf, matrix.read().to(device))
                    matrix.done()
            # What the model computed for itself.
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(device), persistent=False)


def fill_all(config: ModelConfig) -> bool:
    """That no matrix of any model stays in its checkpoint."""
    return False


def load_model(
    source: str,
    dtype: str,
    device: torch.device,
    on_progress: Callable[[int, int], None],
    split: Split = ALONE,
    keeps_stored: Callable[[ModelConfig], bool] = fill_all,
    quantization: Quantization = UNQUANTIZED,
) -> LoadedModel:
    """Loads the model that `source` names, or one rank's shard. Takes memory for its parameters and one tensor, or of a
    tensor that is quantised a piece.

    Args:
        source: A Hugging Face model directory, a .gguf file or a Hub id.
        dtype: A key of `DTYPES`: what parameters are converted to, and what the model computes in.
        on_progress: Called with (bytes read, bytes in all), at the start and after each tensor, also when those that
            stay in the checkpoint are read.
        keeps_stored: Whether the matrices of such a model stay there, for whoever packs them.
        quantization: Of matrices, as they are read here or packed.

    Raises:
        ConfigError: naming the file, the tensor or field, and what to do.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: must be one of {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(source)
    shard = shard_of(checkpoint.config, tp=split.tp, pp=split.pp, rank=split.rank)
    whole = build_model(checkpoint.config)
    places = check_tensors(checkpoint, whole)
    model = whole if split.tp == split.pp == 1 else build_model(checkpoint.config, shard, split.reduce)
    num_bytes = model_bytes = weights_size(model, DTYPES[dtype], quantization.format)
    if model is not whole:
        model_bytes = weights_size(whole, DTYPES[dtype], quantization.format)
    held = _held(model, places)
    # In the order in which reading is fastest.
    wanted = [(tensor, each) for tensor in checkpoint.tensors.values() for each in held.get(tensor.name, ())]
    progress = Progress(sum(part_bytes(tensor, each.part) for tensor, each in wanted), on_progress)
    keeps = keeps_stored(checkpoint.config)
    if not keeps and num_bytes > (free := available_memory_bytes(device)):
        raise ConfigError(
            f"{source}: weights take {num_bytes / 2**30:.2f} GiB in {dtype} and {free / 2**30:.2f} GiB are free: use "
            "--device-map auto with --offload-dir, a dtype of fewer bytes, or more ranks (--tp, --pp)"
        )
    stored: dict[torch.Tensor, StoredMatrix] = {}
    for tensor, (module, leaf, part) in wanted:
        parameter = module.get_parameter(leaf)
        matrix = StoredMatrix(tensor, part, DTYPES[dtype], checkpoint, progress)
        weight_format = format_of(module, quantization.format) if leaf == "weight" else None
        if weight_format is not None:
            matrix.check_groups(weight_format)
        if keeps and parameter.dim() == 2:
            stored[parameter] = matrix
        elif weight_format is not None and is_quantizable(module):
            module.quantized = matrix.read_quantized(weight_format, quantization.quantizer).to(device)
            module.register_parameter(leaf, None)
            matrix.done()
        else:
            _assign(module, leaf, matrix.read().to(device))
            matrix.done()
    digest = model_digest(checkpoint)
    loaded = LoadedModel(model, checkpoint.config, digest, shard, DTYPES[dtype], num_bytes, model_bytes, stored)
    if not keeps:
        loaded.fill(device)
    return loaded


class _Held(NamedTuple):
    """A parameter, by its module and the module's name for it, and what of a tensor it is."""

    module: nn.Module
    leaf: str
    part: Part


def _held(model: nn.Module, places: TensorPlaces) -> dict[str, list[_Held]]:
    """Of each of the checkpoint's tensors: the parameters that it holds."""
    held: dict[str, list[_Held]] = {}
    for module_name, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            part = getattr(module, "parts", {}).get(leaf, WHOLE)
            tensor, stored_part = places.place(f"{module_name}.{leaf}", part)
            held.setdefault(tensor, []).append(_Held(module, leaf, stored_part))
    return held


def check_tensors(checkpoint: Checkpoint, model: nn.Module) -> TensorPlaces:
    """Where the whole model's tensors lie.

    Raises ConfigError where a parameter has no tensor, or one that cannot be read, a tensor no place, or shapes differ.
    """
    of_parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    places = TensorPlaces(checkpoint.names, of_parameters, checkpoint.config.head_dim, checkpoint.tensors)
    shapes = places.stored_shapes()
    files = ", ".join(str(file) for file in checkpoint.files[:3]) + (", …" if len(checkpoint.files) > 3 else "")
    for name in shapes:
        if name not in checkpoint.tensors:
            raise ConfigError(f"{files}: tensor {name} is missing: get the checkpoint anew, or check its config")
    for tensor in checkpoint.tensors.values():
        if tensor.name in shapes:
            if tensor.encoding not in checkpoint.encodings:
                raise ConfigError(
                    f"{tensor.file}: tensor {tensor.name} is stored as {tensor.encoding}: supported are "
                    f"{', '.join(checkpoint.encodings)}"
                )
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
    return places


def weight_bytes(model: nn.Module, dtype: torch.dtype, weight_format: WeightFormat | None) -> Iterator[tuple[str, int]]:
    """Names and bytes of a model's parameters as `dtype`, its matrices in `weight_format` where there is one."""
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(owner, recurse=False):
            leaf = name.rpartition(".")[2]
            of_module = format_of(module, weight_format) if leaf == "weight" else None
            num_bytes = None if of_module is None else of_module.num_bytes(*parameter.shape)
            yield name, parameter.numel() * dtype.itemsize if num_bytes is None else num_bytes


def weights_size(model: nn.Module, dtype: torch.dtype, weight_format: WeightFormat | None) -> int:
    """The bytes of `weight_bytes` together."""
    return sum(num_bytes for _, num_bytes in weight_bytes(model, dtype, weight_format))


def _assign(module: nn.Module, leaf: str, values: torch.Tensor) -> None:
    module.register_parameter(leaf, nn.Parameter(values, requires_grad=False))
