"""A GGUF file: llama.cpp's format of one file, dequantised by the gguf library.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.config_fields import Fields
from engine.model_config import ModelConfig
from engine.models import FAMILIES, config_from_gguf
from engine.models.family import GgufTensorFacts
from engine.weights.checkpoint import WHOLE, FileRows, Part, StoredTensor, check_finite
from engine.weights.pages import release_pages
from engine.weights.tensor_names import TensorNames
from engine.weights.weight_file import WeightFile
from pdmesh.errors import ConfigError
from pdmesh.gguf_header import GgufHeader, GgufTensor, read_gguf_header

_ENCODINGS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")

# Encodings whose values numpy knows; the library takes the bytes of all others.
_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
# That whoever reads the file itself can read.
_PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Decoded at a time: pieces of this size stay in the processor's cache.
_PIECE_VALUES = 1 << 18
# No less than what systems map of a file around the page that is asked for.
_READ_AROUND_BYTES = 1 << 17

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"
_ROPE_FREQS = "rope_freqs.weight"


class GgufFile:
    """The `Checkpoint` of a GGUF file. The file stays mapped until it is garbage."""

    def __init__(self, path: Path) -> None:
        """Reads metadata and the list of tensors. Raises ConfigError."""
        self._path = path
        header = read_gguf_header(path)
        self._file = WeightFile(path)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._file.mapped(), np.uint8)
        # By GGUF's names; the config is read from these and the metadata.
        stored = {tensor.name: self._check(tensor) for tensor in header.tensors}
        self._check_places(header)
        if _EMBEDDING not in stored:
            raise ConfigError(f"{path}: tensor {_EMBEDDING} is missing: take a GGUF file that holds a whole model")
        rope_freqs = stored.pop(_ROPE_FREQS, None)
        facts = GgufTensorFacts(
            vocab_size=stored[_EMBEDDING].shape[0],
            has_output=_OUTPUT in stored,
            has_attention_bias="blk.0.attn_q.bias" in stored,
            has_mlp_bias="blk.0.ffn_gate.bias" in stored,
            has_rope_factors="rope_factors_short.weight" in stored,
            rope_freqs=() if rope_freqs is None else tuple(self._values(rope_freqs, torch.float32).tolist()),
        )
        self._config = config_from_gguf(Fields(str(path), header.metadata), facts, path.stem)
        family = FAMILIES[self._config.architecture].gguf
        assert family is not None
        self._interleaved = family.interleaved
        self._names = family.names
        layer_names = {**_LAYER_NAMES, **family.layer_names}
        self._by_hf_name = {_hf_name(name, layer_names): tensor for name, tensor in stored.items()}
        self._tensors = {
            name: StoredTensor(name, tensor.shape, _encoding(tensor), _num_bytes(tensor), path)
            for name, tensor in self._by_hf_name.items()
        }

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._path,)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    @property
    def names(self) -> TensorNames:
        return self._names

    @property
    def encodings(self) -> Collection[str]:
        return _ENCODINGS

    def rows(self, name: str, part: Part = WHOLE) -> FileRows | None:
        stored = self._tensors[name]
        dtype = _PLAIN_DTYPES.get(stored.encoding)
        if dtype is None or len(stored.shape) != 2 or part.transposed or self._permuted_heads(name):
            return None
        return FileRows.of(stored, part, dtype, self._file, self._by_hf_name[name].offset)

    def read(self, name: str, dtype: torch.dtype, part: Part = WHOLE) -> torch.Tensor:
        values = self._values(self._by_hf_name[name], dtype, part, self._permuted_heads(name))
        check_finite(values, self._tensors[name])
        return values

    def _permuted_heads(self, name: str) -> int | None:
        """How many heads a tensor has whose rows lie in llama.cpp's order."""
        num_heads = {"q_proj": self._config.num_heads, "k_proj": self._config.num_kv_heads}.get(name.split(".")[-2])
        return num_heads if self._interleaved else None

    def _check(self, tensor: GgufTensor) -> GgufTensor:
        """Raises ConfigError for a tensor that we cannot decode, or that the file does not hold whole."""
        encoding = _encoding(tensor)
        if encoding not in _ENCODINGS:
            raise ConfigError(
                f"{self._path}: tensor {tensor.name} is quantised as {encoding}: supported are {', '.join(_ENCODINGS)}"
            )
        per_block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
        if not tensor.shape or tensor.shape[-1] % per_block or tensor.offset + _num_bytes(tensor) > self._bytes.size:
            raise ConfigError(
                f"{self._path}: damaged or cut short (tensor {tensor.name} reaches past the end): get the file anew"
            )
        return tensor

    def _check_places(self, header: GgufHeader) -> None:
        """Raises ConfigError where tensors do not lie one behind the other, each from a multiple of the alignment on:
        ggml refuses such a file, too."""
        begin = header.values_begin
        for tensor in header.tensors:
            if tensor.offset != begin:
                raise ConfigError(
                    f"{self._path}: damaged (tensor {tensor.name} does not begin where the one before ends): get the "
                    "file anew"
                )
            begin += -(-_num_bytes(tensor) // header.alignment) * header.alignment

    def _values(
        self, tensor: GgufTensor, dtype: torch.dtype, part: Part = WHOLE, num_heads: int | None = None
    ) -> torch.Tensor:
        """Dequantised, in memory of their own; with `num_heads`, the rows of each head in Hugging Face's order."""
        values = torch.empty(part.shape_of(tensor.shape), dtype=dtype)
        rows = part.rows_of(tensor.shape)
        # An order of rows that differs only within a head asks for whole heads, in a part and in each of its pieces.
        head_rows = tensor.shape[0] // num_heads if num_heads else 1
        assert rows.start % head_rows == rows.stop % head_rows == 0, f"{rows} of {tensor.name} cut through a head"
        if values.numel() == 0:
            return values
        if len(tensor.shape) == 1:
            decoded = self._decoded(tensor, range(1), rows)[0]
            return values.copy_(_unpermuted(decoded, head_rows) if num_heads else decoded)
        width = math.prod(tensor.shape[1:])
        columns = range(width) if part.columns is None else part.columns
        rows_each = max(_PIECE_VALUES // max(head_rows * width, 1), 1) * head_rows
        for first in range(0, len(rows), rows_each):
            piece = rows[first : first + rows_each]
            decoded = self._decoded(tensor, piece, columns).reshape(len(piece), *values.shape[1:])
            values[first : first + len(piece)] = _unpermuted(decoded, head_rows) if num_heads else decoded
        return values

    def _decoded(self, tensor: GgufTensor, rows: range, columns: range) -> torch.Tensor:
        """Float32, (rows, columns), of a tensor taken as a matrix, a vector as one row."""
        kind = GGMLQuantizationType(tensor.type_id)
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        width = tensor.shape[0] if len(tensor.shape) == 1 else math.prod(tensor.shape[1:])
        row_bytes = width // per_block * block_bytes
        first_block, end_block = columns.start // per_block, -(-columns.stop // per_block)
        begin, end = (tensor.offset + row * row_bytes for row in (rows.start, rows.stop))
        encoded = self._bytes[begin:end].reshape(len(rows), row_bytes)
        wanted = encoded[:, first_block * block_bytes : end_block * block_bytes]
        # As one row: the library works on few rows at a time.
        blocks = np.ascontiguousarray(wanted).reshape(1, -1).view(_PLAIN.get(kind, np.uint8))
        # Float32 comes as it lies in the file, where torch must not write.
        decoded = np.require(dequantize(blocks, kind), requirements=("ALIGNED", "WRITEABLE"))
        release_pages(self._bytes[max(tensor.offset, begin - _READ_AROUND_BYTES) : end])
        columns_from = first_block * per_block
        matrix = decoded.reshape(len(rows), -1)[:, columns.start - columns_from : columns.stop - columns_from]
        return torch.from_numpy(matrix)


def _encoding(tensor: GgufTensor) -> str:
    """ggml's name of how the values are stored, or its number where the library knows no name."""
    try:
        name: str = GGMLQuantizationType(tensor.type_id).name
    except ValueError:
        return f"type {tensor.type_id}"
    return name


def _num_bytes(tensor: GgufTensor) -> int:
    per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
    return math.prod(tensor.shape) // int(per_block) * int(block_bytes)


def _hf_name(gguf_name: str, layer_names: Mapping[str, str]) -> str:
    """Hugging Face's name of a tensor; one that is not known keeps its name, for the loader to refuse."""
    base, _, kind = gguf_name.rpartition(".")
    if base in _TOP_NAMES:
        return f"{_TOP_NAMES[base]}.{kind}"
    match = _LAYER_TENSOR.fullmatch(gguf_name)
    if match is None or match[2] not in layer_names:
        return gguf_name
    return f"model.layers.{match[1]}.{layer_names[match[2]]}.{match[3]}"


def _unpermuted(values: torch.Tensor, head_rows: int) -> torch.Tensor:
    """Rows of whole heads of a q or k projection in Hugging Face's order.

    llama.cpp turns neighbouring dimensions of a head together, Hugging Face's code each with the one half a head
    away; the converter to GGUF interleaves the halves of each head's rows, and this takes them apart.
    """
    pairs = values.reshape(-1, head_rows // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
