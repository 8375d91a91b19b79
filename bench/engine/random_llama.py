"""Llamas with random weights, written as Hugging Face directories: any shape, where only speed is asked for."""

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.engine.checkpoints import hf_config
from engine.decoder_config import DecoderLayers, NormConfig, turns_by
from engine.loader import DTYPES
from engine.model_config import ModelConfig
from engine.models import build_model
from engine.rope import RopeConfig


def llama_config(
    name: str,
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
) -> ModelConfig:
    return ModelConfig(
        name=name,
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        max_position=8192,
        tie_word_embeddings=False,
        eos_token_ids=(1,),
        bos_token_id=0,
        layers=DecoderLayers(NormConfig("rms", 1e-5), turns_by(RopeConfig(theta=500000.0))),
    )


# So small that what is not the model's work weighs most.
TINY = llama_config(
    "tiny-llama",
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
)
# The shape of Llama 3.1 8B.
LLAMA_8B = llama_config(
    "random-llama-8b",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
)


def write_random_llama(
    config: ModelConfig, dtype: str, directory: Path, device: torch.device, *, num_files: int | None = None
) -> Path:
    """Draws the weights on `device` and writes them into `directory`; returns the directory.

    Args:
        num_files: Among which the layers are shared out; None: a file for each, and some for the rest.
    """
    draw = torch.Generator(device).manual_seed(0)
    shapes = [(name, parameter.shape) for name, parameter in build_model(config).named_parameters()]
    weight_map: dict[str, str] = {}
    for place, group in itertools.groupby(shapes, key=lambda shape: _file(shape[0], config.num_layers, num_files)):
        file = f"model-{place}.safetensors"
        tensors = {name: _values(shape, dtype, draw) for name, shape in group}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(hf_config(config, dtype)))
    return directory


def _file(name: str, num_layers: int, num_files: int | None) -> str:
    layer = _layer(name)
    if num_files is None:
        return layer
    number = int(layer) if layer.isdecimal() else 0 if "embed" in name else num_layers - 1
    return f"{number * num_files // num_layers + 1}-of-{num_files}"


def _layer(name: str) -> str:
    """`model.layers.7.mlp.up_proj.weight` -> 7; what is in no layer has a file of its own."""
    parts = name.split(".")
    return parts[2] if parts[1] == "layers" else "-".join(parts[:-1])


def _values(shape: torch.Size, dtype: str, draw: torch.Generator) -> torch.Tensor:
    """Norms are 1; matrices keep activations of moderate size."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=DTYPES[dtype])
    return (torch.randn(shape, generator=draw, device=draw.device) * 0.02).to(DTYPES[dtype]).cpu()
