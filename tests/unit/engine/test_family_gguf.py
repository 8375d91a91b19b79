"""GGUF files of the families, named as llama.cpp's converter names what they hold."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from engine.decoder_config import DecoderLayers, NormConfig
from engine.loader import Split, load_model
from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError
from tests.texts import load
from tests.tiny_families import SHAPES, make_tiny_family

ARCHITECTURES = {
    "Qwen2": gguf.MODEL_ARCH.QWEN2,
    "Qwen3": gguf.MODEL_ARCH.QWEN3,
    "Phi3": gguf.MODEL_ARCH.PHI3,
}


def write_gguf(
    directory: Path, shape: str, path: Path, **tensors: np.ndarray[tuple[int], np.dtype[np.float32]]
) -> Path:
    """The model of `SHAPES[shape]` that lies in `directory`, and more tensors, in float32."""
    checkpoint = open_checkpoint(str(directory))
    config, layers = checkpoint.config, DecoderLayers.of(checkpoint.config)
    architecture = ARCHITECTURES[SHAPES[shape].family]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    if SHAPES[shape].family == "Qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if SHAPES[shape].family == "Phi3":
        writer.add_rope_dimension_count(layers.rope.rotary_dim(config.head_dim))
        writer.add_sliding_window(config.window(0) or 0)
    writer.add_rope_freq_base(layers.rope.theta)
    writer.add_layer_norm_rms_eps(layers.norm.eps)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    for name in checkpoint.tensors:
        values = checkpoint.read(name, torch.float32).numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    for name, extra in tensors.items():
        writer.add_tensor(name, extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("shape", ["qwen2", "qwen3", "phi3-window", "phi3-partial"])
def test_a_file_holds_the_same_model(tmp_path: Path, shape: str) -> None:
    directory = make_tiny_family(tmp_path / "hf", shape)
    expected, loaded = load(directory), load(write_gguf(directory, shape, tmp_path / "tiny.gguf"))
    # GGUF keeps it in float32.
    eps = float(np.float32(DecoderLayers.of(expected.config).norm.eps))
    layers = replace(DecoderLayers.of(expected.config), norm=NormConfig("rms", eps))
    assert loaded.config == replace(expected.config, name="tiny", layers=layers)
    parameters = dict(loaded.model.named_parameters())
    for name, values in expected.model.named_parameters():
        assert torch.equal(parameters.pop(name), values), name
    assert not parameters


@pytest.mark.parametrize("in_gguf", [False, True])
def test_a_rank_reads_its_parts_of_what_is_fused(tmp_path: Path, in_gguf: bool) -> None:
    directory = make_tiny_family(tmp_path / "hf", "phi3-window")
    source = write_gguf(directory, "phi3-window", tmp_path / "tiny.gguf") if in_gguf else directory
    whole = dict(load(directory).model.named_parameters())
    progress: list[tuple[int, int]] = []
    ranks = []
    for rank in range(2):
        loaded = load_model(
            str(source), "float32", torch.device("cpu"), lambda *done: progress.append(done), Split(2, 1, rank)
        )
        # In the file, too, values are float32.
        assert progress[-1] == (loaded.num_bytes, loaded.num_bytes)
        ranks.append(dict(loaded.model.named_parameters()))
    for layer in range(3):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            of_ranks: list[torch.Tensor] = [rank[f"model.layers.{layer}.{name}.weight"] for rank in ranks]
            assert torch.equal(torch.cat(of_ranks), whole[f"model.layers.{layer}.{name}.weight"]), name


def test_longrope_in_a_file_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_family(tmp_path / "hf", "phi3-window")
    factors = {f"rope_factors_{kind}.weight": np.ones(8, np.float32) for kind in ("short", "long")}
    path = write_gguf(directory, "phi3-window", tmp_path / "tiny.gguf", **factors)
    with pytest.raises(ConfigError, match=r"tiny.gguf: longrope scaling is not supported in GGUF files: take the"):
        load(path)
