"""A Hugging Face model directory: config.json and safetensors, in one file or in shards that an index lists."""

import json
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.config_fields import Fields
from engine.model_config import ModelConfig
from engine.models import FAMILIES, config_from_hf
from engine.weights.checkpoint import WHOLE, FileRows, Part, StoredTensor, check_finite, cut_short, unreadable
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
# Read at a time, of what is converted or cut.
_PIECE_BYTES = 8 * 2**20
_ENCODINGS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HfDirectory:
    """The `Checkpoint` of a directory. Files stay open until it is garbage."""

    def __init__(self, directory: Path, name: str) -> None:
        """Reads the config and the header of each safetensors file. Raises ConfigError."""
        self._directory = directory
        self._config = _read_config(directory, name)
        listed = _shard_names(directory)
        self._shards = {file: _open_shard(file) for file in (directory / shard for shard in listed)}
        self._tensors = {tensor.name: tensor for shard in self._shards.values() for tensor in shard.tensors}
        for shard, names in listed.items():
            self._check_listed(shard, names)
        if self._config.tie_word_embeddings and self._has_own_output():
            self._config = replace(self._config, tie_word_embeddings=False)

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._shards)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    @property
    def names(self) -> TensorNames:
        return FAMILIES[self._config.architecture].names

    @property
    def encodings(self) -> Collection[str]:
        return _ENCODINGS

    def rows(self, name: str, part: Part = WHOLE) -> FileRows | None:
        stored = self._tensors[name]
        if len(stored.shape) != 2 or part.transposed or stored.encoding == "F64":
            return None
        shard = self._shards[stored.file]
        return FileRows.of(stored, part, _ENCODINGS[stored.encoding], shard.file, shard.offsets[name])

    def read(self, name: str, dtype: torch.dtype, part: Part = WHOLE) -> torch.Tensor:
        stored = self._tensors[name]
        shard, encoding = self._shards[stored.file], _ENCODINGS[stored.encoding]
        row_bytes = stored.num_bytes // max(stored.shape[0], 1)
        rows_each = max(_PIECE_BYTES // max(row_bytes, 1), 1)
        values = torch.empty(part.shape_of(stored.shape), dtype=dtype)
        # As they lie, whole rows can be read to their place.
        as_stored = dtype == encoding and part.columns is None and not part.transposed
        buffer = torch.empty((0 if as_stored else min(rows_each, stored.shape[0]), *stored.shape[1:]), dtype=encoding)
        for rows, columns, place in _blocks(part, stored.shape, values):
            for first in range(0, len(rows), rows_each):
                piece = rows[first : first + rows_each]
                of_piece = place[first : first + len(piece)]
                lying = of_piece if as_stored else buffer[: len(piece)]
                try:
                    shard.file.read(shard.offsets[name] + piece.start * row_bytes, lying)
                except EOFError:
                    raise cut_short(stored) from None
                except OSError as error:
                    raise unreadable(stored, str(error.strerror)) from error
                if not as_stored:
                    of_piece.copy_(lying[(slice(None), *columns)])
                check_finite(of_piece, stored)
        return values

    def _check_listed(self, shard: str, listed: frozenset[str]) -> None:
        """Raises ConfigError where the index puts a tensor into a shard that does not hold it."""
        for name in sorted(listed):
            if name not in self._tensors or self._tensors[name].file.name != shard:
                raise ConfigError(
                    f"{self._directory / _INDEX}: tensor {name} is listed in {shard}, which does not hold it: "
                    "get the index and its shards from the same place"
                )

    def _has_own_output(self) -> bool:
        """Whether there is an output matrix that is no copy of the embedding: transformers takes it then, whatever the
        config says of sharing one. Raises ConfigError where the two cannot be read."""
        prefix = self.names.optional_prefix
        output, embedding = (
            self._tensors.get(name) or self._tensors.get(name.removeprefix(prefix))
            for name in (f"{self.names.stored(module)}.weight" for module in ("lm_head", "model.embed_tokens"))
        )
        if output is None or embedding is None or output.shape != embedding.shape:
            return output is not None
        if len(output.shape) != 2 or not {output.encoding, embedding.encoding} <= _ENCODINGS.keys():
            # It is said of the embedding, when that is asked for.
            return False
        rows_each = max(_PIECE_BYTES // max(4 * output.shape[1], 1), 1)
        return not all(
            torch.equal(*(self.read(matrix.name, torch.float32, Part(rows)) for matrix in (output, embedding)))
            for rows in (
                range(first, min(first + rows_each, output.shape[0])) for first in range(0, output.shape[0], rows_each)
            )
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


def _read_config(directory: Path, name: str) -> ModelConfig:
    path, generation_path = directory / _CONFIG, directory / _GENERATION_CONFIG
    generation = _read_json(generation_path) if generation_path.exists() else {}
    return config_from_hf(Fields(str(path), _read_json(path)), Fields(str(generation_path), generation), name)


def _shard_names(directory: Path) -> dict[str, frozenset[str]]:
    """The names of the safetensors files, with the tensors that the index lists in each (none without an index)."""
    single, index_path = directory / _SINGLE, directory / _INDEX
    # It counts where an index is there, too.
    if single.exists() or single.is_symlink():
        return {_SINGLE: frozenset()}
    if not index_path.exists():
        raise ConfigError(f"{directory}: neither {_SINGLE} nor {_INDEX} is there: convert the model to safetensors")
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index_path}: weight_map is missing: get the file anew")
    shards: dict[str, set[str]] = {}
    for tensor_name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConfigError(f"{index_path}: tensor {tensor_name} lies in {shard!r}: must be a file of this directory")
        shards.setdefault(shard, set()).add(tensor_name)
    return {shard: frozenset(shards[shard]) for shard in sorted(shards)}


@dataclass(frozen=True, slots=True)
class _Shard:
    """An open safetensors file: the tensors in it, in the order in which they lie, and where each begins."""

    file: WeightFile
    tensors: tuple[StoredTensor, ...]
    offsets: Mapping[str, int]


def _open_shard(path: Path) -> _Shard:
    """https://github.com/huggingface/safetensors#format. Raises ConfigError."""
    if not path.exists():
        if path.is_symlink():
            raise ConfigError(f"{path}: is a link to a file that is not there: download the model anew")
        raise ConfigError(f"{path}: is listed in {_INDEX} and missing: get this shard too")
    file = WeightFile(path)
    try:
        # It checks the header against the file's size: tensors lie one behind the other, to the end. For numpy the
        # system is not asked for as much memory as the file is long.
        safe_open(path, framework="np")
        with path.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(header_bytes))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file ({error}): get it anew") from error
    header.pop("__metadata__", None)
    tensors, offsets = [], {}
    for name, tensor in sorted(header.items(), key=lambda named: named[1]["data_offsets"]):
        begin, end = tensor["data_offsets"]
        tensors.append(StoredTensor(name, tuple(tensor["shape"]), tensor["dtype"], end - begin, path))
        offsets[name] = 8 + header_bytes + begin
    return _Shard(file, tuple(tensors), offsets)


def _read_json(path: Path) -> dict[str, object]:
    try:
        state = path.stat()
        # A pipe or a device would be read for ever.
        if not stat.S_ISREG(state.st_mode):
            raise ConfigError(f"{path}: is no regular file: get the file anew")
        if state.st_size > _MAX_JSON_BYTES:
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
