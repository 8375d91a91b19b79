"""GGUF files, written as llama.cpp's converter writes them, whole and damaged."""

import os
import re
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Encoding
from transformers import LlamaForCausalLM

from engine.decoder_config import DecoderLayers, NormConfig
from engine.loader import LoadedModel, load_model
from engine.model_config import ModelConfig
from engine.rope import YarnScaling
from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError

ENCODINGS = [Encoding.F32, Encoding.F16, Encoding.BF16, Encoding.Q8_0, Encoding.Q4_0, Encoding.Q4_1]


def gguf_name(name: str) -> str:
    replacements = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ]
    for old, new in replacements:
        name = name.replace(old, new)
    return name


class Writer:
    """Writes a Hugging Face model as GGUF; attributes may be changed before `write`."""

    def __init__(self, directory: Path, encoding: Encoding = Encoding.F32) -> None:
        self.model = LlamaForCausalLM.from_pretrained(directory)
        self.encoding = encoding
        self.architecture = "llama"
        self.tensors = {name: tensor.numpy() for name, tensor in self.model.state_dict().items()}
        if self.model.config.tie_word_embeddings:
            del self.tensors["lm_head.weight"]
        self.metadata: dict[str, int | float | str] = {}

    def stored(self, name: str) -> np.ndarray:
        """A tensor's bytes. Norms and biases stay whole, as llama.cpp has it."""
        stored: np.ndarray = gguf.quants.quantize(self.tensors[name], self.encoding_of(name))
        return stored

    def encoding_of(self, name: str) -> Encoding:
        return self.encoding if self.tensors[name].ndim > 1 else Encoding.F32

    def write(self, path: Path) -> Path:
        config = self.model.config
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_token_list(["a", "b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        for key, value in self.metadata.items():
            writer.kv_data[0].pop(key, None)
            adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            adders[type(value)](key, value)
        for name in self.tensors:
            tensor = self.stored(name)
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            for projection, num_heads in heads.items():
                if projection in name:
                    tensor = permuted(tensor, num_heads)
            writer.add_tensor(gguf_name(name), tensor, raw_dtype=self.encoding_of(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def permuted(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """As convert_hf_to_gguf.py's LlamaModel.permute; rows move whole, so their encoding does not matter."""
    shape = (num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return tensor.reshape(shape).swapaxes(1, 2).reshape(tensor.shape)


def load(path: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(str(path), dtype, torch.device("cpu"), lambda done, total: None)


def config_of(path: Path) -> ModelConfig:
    return open_checkpoint(str(path)).config


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("shape", ["gqa", "mqa-tied", "wide-heads", "biases"])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
def test_round_trip(tiny_llama: Callable[[str], Path], tmp_path: Path, shape: str, encoding: Encoding) -> None:
    writer = Writer(tiny_llama(shape), encoding)
    loaded = load(writer.write(tmp_path / "tiny.gguf"))
    parameters = dict(loaded.model.named_parameters())
    assert parameters.keys() == writer.tensors.keys()
    for name, parameter in parameters.items():
        expected = gguf.quants.dequantize(writer.stored(name), writer.encoding_of(name))
        assert torch.equal(parameter, torch.from_numpy(expected)), name


@pytest.mark.parametrize("shape", ["gqa", "mqa-tied", "wide-heads", "biases"])
def test_config_equals_that_of_the_directory(tiny_llama: Callable[[str], Path], tmp_path: Path, shape: str) -> None:
    from_gguf = config_of(Writer(tiny_llama(shape)).write(tmp_path / f"tiny-{shape}.gguf"))
    from_hf = config_of(tiny_llama(shape))
    # GGUF keeps it in float32.
    eps = DecoderLayers.of(from_gguf).norm.eps
    assert eps == pytest.approx(DecoderLayers.of(from_hf).norm.eps)
    exact = replace(
        from_hf, name=from_gguf.name, layers=replace(DecoderLayers.of(from_hf), norm=NormConfig("rms", eps))
    )
    assert from_gguf == exact


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_weights_are_converted(
    tiny_llama: Callable[[str], Path], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    path = Writer(tiny_llama("gqa"), Encoding.Q8_0).write(tmp_path / "tiny.gguf")
    single = dict(load(path).model.named_parameters())
    for key, parameter in load(path, name).model.named_parameters():
        assert torch.equal(parameter, single[key].to(dtype))


def test_every_way_to_end_a_text(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    writer = Writer(tiny_llama("gqa"))
    writer.metadata = {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 2}
    assert config_of(writer.write(tmp_path / "tiny.gguf")).eos_token_ids == (2, 9)


def test_rope_scaling(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    writer = Writer(tiny_llama("gqa"))
    writer.metadata = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    scaling = DecoderLayers.of(config_of(writer.write(tmp_path / "tiny.gguf"))).rope.scaling
    assert isinstance(scaling, YarnScaling)
    assert (scaling.factor, scaling.original_max_position) == (4.0, 64)
    assert (scaling.beta_fast, scaling.beta_slow) == (32.0, 1.0)
    writer.metadata |= {"llama.rope.scaling.yarn_beta_fast": 8.0, "llama.rope.scaling.yarn_beta_slow": 2.0}
    scaling = DecoderLayers.of(config_of(writer.write(tmp_path / "betas.gguf"))).rope.scaling
    assert isinstance(scaling, YarnScaling)
    assert (scaling.beta_fast, scaling.beta_slow) == (8.0, 2.0)
    writer.metadata |= {"llama.rope.scaling.yarn_attn_factor": 3.0}
    assert "llama.rope.scaling.yarn_attn_factor is 3.0: only 1 is supported" in refusal(
        writer.write(tmp_path / "attention.gguf")
    )


def test_rope_freqs_tensor(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    """A Llama 3.1 as llama.cpp converts it turns as the original does."""
    directory = tiny_llama("rope-llama3")
    original = load(directory)
    writer = Writer(directory)
    plain = load(tiny_llama("gqa")).model.get_buffer("model.rotary_tables.0.inv_freq")
    factors = (plain / original.model.get_buffer("model.rotary_tables.0.inv_freq")).numpy()
    writer.tensors["rope_freqs.weight"] = factors
    converted = load(writer.write(tmp_path / "tiny.gguf"))
    assert DecoderLayers.of(converted.config).rope.freq_factors == tuple(factors.tolist())
    torch.testing.assert_close(
        converted.model.get_buffer("model.rotary_tables.0.inv_freq"),
        original.model.get_buffer("model.rotary_tables.0.inv_freq"),
        rtol=1e-6,
        atol=0,
    )
    writer.tensors["rope_freqs.weight"] = factors[:-1]
    assert refusal(writer.write(tmp_path / "short.gguf")).endswith("rope_freqs.weight has 7 values: must be 8")
    writer.tensors["rope_freqs.weight"] = factors * 0
    assert "rope_freqs.weight holds values that are not above 0" in refusal(writer.write(tmp_path / "zero.gguf"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"llama.attention.head_count_kv": 3},
            "llama.attention.head_count_kv is 3: must divide llama.attention.head_count, 4",
        ),
        ({"llama.embedding_length": 2**31}, "llama.embedding_length is 2147483648: must be an integer in [1, "),
        ({"llama.block_count": 0}, "llama.block_count is 0: must be an integer in [1, "),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8: must equal the head dimension, 16"),
        (
            {"llama.attention.sliding_window": 100},
            "llama.attention.sliding_window is 100: windows of this family are no",
        ),
        ({"llama.expert_count": 8}, "llama.expert_count is 8: mixtures of experts are not supported"),
        ({"llama.context_length": "long"}, "llama.context_length is 'long': must be an integer in [1, "),
        ({"general.architecture": "mamba"}, "general.architecture is 'mamba': known are llama"),
        ({"tokenizer.ggml.eos_token_id": 320}, "tokenizer.ggml.eos_token_id is 320: must be an integer in [0, 319]"),
    ],
)
def test_refusals_name_file_and_field(
    tiny_llama: Callable[[str], Path], tmp_path: Path, metadata: dict[str, int | float | str], message: str
) -> None:
    writer = Writer(tiny_llama("gqa"))
    writer.metadata = metadata
    path = writer.write(tmp_path / "tiny.gguf")
    assert refusal(path).startswith(f"{path}: {message}")


def test_wrong_shape(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    writer = Writer(tiny_llama("gqa"))
    writer.metadata = {"llama.feed_forward_length": 128}
    message = refusal(writer.write(tmp_path / "tiny.gguf"))
    assert re.search(
        r"tensor model\.layers\.0\.mlp\.\w+_proj\.weight has shape \[.*\], and the config asks for", message
    )


def test_missing_tensor(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    writer = Writer(tiny_llama("gqa"))
    del writer.tensors["model.layers.2.mlp.up_proj.weight"]
    path = writer.write(tmp_path / "tiny.gguf")
    assert refusal(path).startswith(f"{path}: tensor model.layers.2.mlp.up_proj.weight is missing: ")
    del writer.tensors["model.embed_tokens.weight"]
    path = writer.write(tmp_path / "less.gguf")
    assert refusal(path).startswith(f"{path}: tensor token_embd.weight is missing: ")


def test_tensor_without_a_place(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    writer = Writer(tiny_llama("gqa"))
    writer.tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, dtype=np.float32)
    assert "tensor blk.0.attn_q_norm.weight has no place in LlamaForCausalLM" in refusal(
        writer.write(tmp_path / "t.gguf")
    )


def test_unknown_encoding(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    path = Writer(tiny_llama("gqa"), Encoding.Q5_1).write(tmp_path / "tiny.gguf")
    assert refusal(path) == (
        f"{path}: tensor token_embd.weight is quantised as Q5_1: "
        "supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K"
    )


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 not this", b"FUGG"])
def test_bad_magic(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert refusal(path) == f"{path}: not a GGUF file (it does not begin with GGUF): name the right file"


@pytest.mark.parametrize("keep", [4, 20, 200, 3000, -1])
def test_truncated_file(tiny_llama: Callable[[str], Path], tmp_path: Path, keep: int) -> None:
    path = Writer(tiny_llama("gqa")).write(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(path)
    assert message.startswith(f"{path}: damaged or cut short (")
    assert message.endswith("): get the file anew")


@pytest.mark.parametrize("change", [4, -4, 32, -32, -(2**15)])
def test_a_tensor_that_begins_elsewhere(tiny_llama: Callable[[str], Path], tmp_path: Path, change: int) -> None:
    path = Writer(tiny_llama("gqa")).write(tmp_path / "tiny.gguf")
    content = bytearray(path.read_bytes())
    name = b"blk.1.attn_q.weight"
    # Behind the name: the number of dimensions, two of them, and the encoding.
    place = content.index(name) + len(name) + 4 + 2 * 8 + 4
    (offset,) = struct.unpack_from("<Q", content, place)
    struct.pack_into("<Q", content, place, offset + change)
    path.write_bytes(content)
    assert refusal(path) == (
        f"{path}: damaged (tensor blk.1.attn_q.weight does not begin where the one before ends): get the file anew"
    )


@pytest.mark.parametrize(("kind", "num_bytes"), [(0, 1), (4, 4), (8, 8)])
def test_an_absurd_array_in_a_file_that_could_hold_it(tmp_path: Path, kind: int, num_bytes: int) -> None:
    path, count = tmp_path / "tiny.gguf", 10**8
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"x", 9, kind, count))
    # Holes take no room.
    os.truncate(path, count * num_bytes + 1000)
    began = time.monotonic()
    assert refusal(path) == f"{path}: damaged or cut short (an array of {count} values): get the file anew"
    assert time.monotonic() - began < 10


def test_version_of_the_future(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    path = Writer(tiny_llama("gqa")).write(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack("<I", 99) + content[8:])
    assert refusal(path) == f"{path}: a GGUF file of version 99; known are 2 and 3: convert the model anew"


def test_digest_changes_with_one_weight_byte(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    path = Writer(tiny_llama("gqa")).write(tmp_path / "tiny.gguf")
    before = load(path).digest
    assert load(path).digest == before
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    assert load(path).digest != before
