"""A GGUF file: llama.cpp's format of one file, read through the gguf library and dequantised.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize

from engine.config_fields import Fields
from engine.model_config import GgufTensorFacts, ModelConfig, config_from_gguf
from engine.weights.checkpoint import StoredTensor
from pdmesh.errors import ConfigError

_ENCODINGS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")

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
        reader = _open(path)
        # By GGUF's names; the config is read from these and the metadata.
        stored = {tensor.name: tensor for tensor in reader.tensors}
        for tensor in reader.tensors:
            if tensor.tensor_type.name not in _ENCODINGS:
                raise ConfigError(
                    f"{path}: tensor {tensor.name} is quantised as {tensor.tensor_type.name}: "
                    f"supported are {', '.join(_ENCODINGS)}"
                )
        if _EMBEDDING not in stored:
            raise ConfigError(f"{path}: tensor {_EMBEDDING} is missing: take a GGUF file that holds a whole model")
        rope_freqs = stored.pop(_ROPE_FREQS, None)
        facts = GgufTensorFacts(
            vocab_size=int(stored[_EMBEDDING].shape[-1]),
            has_output=_OUTPUT in stored,
            has_attention_bias="blk.0.attn_q.bias" in stored,
            has_mlp_bias="blk.0.ffn_gate.bias" in stored,
            rope_freqs=() if rope_freqs is None else tuple(_values(rope_freqs).tolist()),
        )
        self._config = config_from_gguf(Fields(str(path), _scalars(reader)), facts, path.stem)
        self._by_hf_name = {_hf_name(name): tensor for name, tensor in stored.items()}
        self._tensors = {name: _stored_tensor(name, tensor, path) for name, tensor in self._by_hf_name.items()}

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._path,)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        values = _values(self._by_hf_name[name])
        if ".self_attn.q_proj." in name:
            values = _unpermuted(values, self._config.num_heads)
        elif ".self_attn.k_proj." in name:
            values = _unpermuted(values, self._config.num_kv_heads)
        return values.to(dtype)


def _open(path: Path) -> Any:
    """The gguf library's reader. It maps the file, so sizes in a damaged header lead past the end and not to memory."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if not is_gguf:
            raise ConfigError(f"{path}: not a GGUF file (it does not begin with GGUF): name the right file")
        return GGUFReader(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ConfigError(f"{path}: damaged or cut short ({error}): get the file anew") from error


def _scalars(reader: Any) -> dict[str, object]:
    """The metadata but for arrays, which are the tokenizer's and large; a marker stands for each."""
    return {
        name: "an array" if field.types[0] == GGUFValueType.ARRAY else field.contents()
        for name, field in reader.fields.items()
    }


def _hf_name(gguf_name: str) -> str:
    """Hugging Face's name of a tensor; one that is not known keeps its name, for the loader to refuse."""
    base, _, kind = gguf_name.rpartition(".")
    if base in _TOP_NAMES:
        return f"{_TOP_NAMES[base]}.{kind}"
    match = _LAYER_TENSOR.fullmatch(gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        return gguf_name
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _stored_tensor(name: str, tensor: Any, path: Path) -> StoredTensor:
    # GGUF names dimensions innermost first.
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return StoredTensor(name, shape, tensor.tensor_type.name, int(tensor.n_bytes), path)


def _values(tensor: Any) -> torch.Tensor:
    """Dequantised, float32, in memory of their own."""
    values: Any = dequantize(tensor.data, tensor.tensor_type)
    # Only F32 needs no decoding: those values are still the mapped file's, read-only.
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _unpermuted(values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a q or k projection in Hugging Face's order.

    llama.cpp turns neighbouring dimensions of a head together, Hugging Face's code each with the one half a head
    away; the converter to GGUF interleaves the halves of each head's rows, and this takes them apart.
    """
    pairs = values.view(num_heads, -1, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
