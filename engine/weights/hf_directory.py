"""A Hugging Face model directory: config.json and safetensors, in one file or in shards that an index lists."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from engine.config_fields import Fields
from engine.model_config import ModelConfig
from engine.models import FAMILIES, config_from_hf
from engine.weights.checkpoint import WHOLE, FileRows, Part, StoredTensor, check_finite
from engine.weights.pages import open_to_read, release_pages
from engine.weights.tensor_names import TensorNames
from engine.weights.weight_file import WeightFile
from pdmesh.errors import ConfigError

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# What of a Hub repository a checkpoint needs; "model*" leaves out copies in other layouts ("consolidated*").
DOWNLOAD_PATTERNS = (_CONFIG, _GENERATION_CONFIG, _INDEX, "model*.safetensors")

_MAX_JSON_BYTES = 64 * 2**20
# How much of the mapped file is read before its pages are let go.
_PIECE_BYTES = 8 * 2**20
_ENCODING_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# That whoever reads the files itself can read.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HfDirectory:
    """The `Checkpoint` of a directory. Files stay mapped until it is garbage."""

    def __init__(self, directory: Path, name: str) -> None:
        """Reads the config and the header of each safetensors file. Raises ConfigError."""
        self._directory = directory
        self._config = _read_config(directory, name)
        shards = _shard_names(directory)
        self._files = tuple(directory / shard for shard in shards)
        self._tensors = {tensor.name: tensor for file in self._files for tensor in _stored_tensors(file)}
        # Mapped for torch, as values are asked for.
        self._shards: dict[Path, Any] = {}
        self._layouts: dict[Path, _Layout] = {}
        for shard, listed in shards.items():
            self._check_listed(shard, listed)

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def files(self) -> tuple[Path, ...]:
        return self._files

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    @property
    def names(self) -> TensorNames:
        return FAMILIES[self._config.architecture].names

    def rows(self, name: str, part: Part = WHOLE) -> FileRows | None:
        stored = self._tensors[name]
        if len(stored.shape) != 2 or part.transposed or stored.encoding not in _PLAIN:
            return None
        if stored.file not in self._layouts:
            self._layouts[stored.file] = _read_layout(stored.file)
        layout = self._layouts[stored.file]
        return FileRows.of(stored, part, _PLAIN[stored.encoding], layout.file, layout.offsets[name])

    def read(self, name: str, dtype: torch.dtype, part: Part = WHOLE) -> torch.Tensor:
        stored = self._tensors[name]
        # Copied even where the dtype is right: nobody sees to it that the file stays as it is.
        values = torch.empty(part.shape_of(stored.shape), dtype=dtype)
        if stored.file not in self._shards:
            self._shards[stored.file] = _open_shard(stored.file, "pt")
        try:
            lazy = self._shards[stored.file].get_slice(name)
            if values.dim() == 0:
                values.copy_(lazy[...])
                check_finite(values, stored)
                return values
            whole = _bytes_of(lazy[...])
            row_bytes = stored.num_bytes // max(stored.shape[0], 1)
            rows_each = max(_PIECE_BYTES // max(row_bytes, 1), 1)
            for rows, columns, place in _blocks(part, stored.shape, values):
                for first in range(0, len(rows), rows_each):
                    piece = rows[first : first + rows_each]
                    # From views of the mapped file.
                    of_piece = place[first : first + len(piece)]
                    of_piece.copy_(lazy[(slice(piece.start, piece.stop), *columns)])
                    check_finite(of_piece, stored)
                    # The whole: systems map more of a file than is asked for, on both sides of a piece.
                    release_pages(whole)
        except SafetensorError as error:
            raise ConfigError(f"{stored.file}: tensor {name} cannot be read ({error}): get the file anew") from error
        return values

    def _check_listed(self, shard: str, listed: frozenset[str]) -> None:
        """Raises ConfigError where the index puts a tensor into a shard that does not hold it."""
        for name in sorted(listed):
            if name not in self._tensors or self._tensors[name].file.name != shard:
                raise ConfigError(
                    f"{self._directory / _INDEX}: tensor {name} is listed in {shard}, which does not hold it: "
                    "get the index and its shards from the same place"
                )


def _blocks(
    part: Part, shape: tuple[int, ...], values: torch.Tensor
) -> Iterator[tuple[range, tuple[slice, ...], torch.Tensor]]:
    """Of a part: runs of stored rows, the stored columns of each, and where in `values` they belong."""
    first = 0
    for run in part.runs_of(shape):
        place = values[first : first + len(run)]
        first += len(run)
        if part.transposed:
            yield part.columns_of(shape), (slice(run.start, run.stop),), place.t()
        else:
            columns = () if part.columns is None else (slice(part.columns.start, part.columns.stop),)
            yield run, columns, place


def _bytes_of(mapped: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous tensor, where they lie."""
    return mapped.flatten().view(torch.uint8).numpy()


def _read_config(directory: Path, name: str) -> ModelConfig:
    path, generation_path = directory / _CONFIG, directory / _GENERATION_CONFIG
    generation = _read_json(generation_path) if generation_path.exists() else {}
    return config_from_hf(Fields(str(path), _read_json(path)), Fields(str(generation_path), generation), name)


def _shard_names(directory: Path) -> dict[str, frozenset[str]]:
    """The names of the safetensors files, with the tensors that the index lists in each (none without an index)."""
    index_path = directory / _INDEX
    if not index_path.exists():
        if not (directory / _SINGLE).exists():
            raise ConfigError(f"{directory}: neither {_SINGLE} nor {_INDEX} is there: convert the model to safetensors")
        return {_SINGLE: frozenset()}
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index_path}: weight_map is missing: get the file anew")
    shards: dict[str, set[str]] = {}
    for tensor_name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConfigError(f"{index_path}: tensor {tensor_name} lies in {shard!r}: must be a file of this directory")
        shards.setdefault(shard, set()).add(tensor_name)
    return {shard: frozenset(shards[shard]) for shard in sorted(shards)}


def _open_shard(file: Path, framework: Literal["np", "pt"]) -> Any:
    """A handle of the safetensors library, which publishes no types. It checks the header against the file's size.

    For torch, the system is asked for as much memory as the file is long, though but pages that are read take any; for
    numpy, which cannot read all encodings, it is not.
    """
    if not file.exists():
        raise ConfigError(f"{file}: is listed in {_INDEX} and missing: get this shard too")
    # The library calls a file that it may not read one that is not there.
    os.close(open_to_read(file))
    try:
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: not a whole safetensors file ({error}): get it anew") from error
    except RuntimeError as error:
        raise ConfigError(f"{file}: cannot be mapped ({error}): take a copy of the model in smaller shards") from error


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where tensors lie in an open file."""

    file: WeightFile
    offsets: Mapping[str, int]


def _read_layout(file: Path) -> _Layout:
    """Of a file whose header the library has checked. https://github.com/huggingface/safetensors#format"""
    opened = WeightFile(file)
    header_bytes = int.from_bytes(os.pread(opened.descriptor, 8, 0), "little")
    header = json.loads(os.pread(opened.descriptor, header_bytes, 8))
    header.pop("__metadata__", None)
    first = 8 + header_bytes
    return _Layout(opened, {name: first + tensor["data_offsets"][0] for name, tensor in header.items()})


def _stored_tensors(file: Path) -> list[StoredTensor]:
    shard = _open_shard(file, "np")
    tensors = []
    for name in shard.offset_keys():
        header = shard.get_slice(name)
        shape, encoding = tuple(header.get_shape()), header.get_dtype()
        if encoding not in _ENCODING_BYTES:
            known = ", ".join(_ENCODING_BYTES)
            raise ConfigError(f"{file}: tensor {name} is stored as {encoding}: supported are {known}")
        num_bytes = torch.Size(shape).numel() * _ENCODING_BYTES[encoding]
        tensors.append(StoredTensor(name, shape, encoding, num_bytes, file))
    return tensors


def _read_json(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_JSON_BYTES // 2**20} MiB: not the file it is named for")
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: is missing: name a Hugging Face model directory, a .gguf file or a Hub id"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}): get the file anew") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object: get the file anew")
    return content
