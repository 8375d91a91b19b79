"""A Llama with the columns of its matrices in another order: the same function, whose groups of weights are others.

A file that was quantised keeps its values when it is quantised alike, which tells nothing of one that was not.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.model_config import ModelConfig

_READ_RESIDUAL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_ADD_TO_RESIDUAL = ("o_proj", "down_proj")


def write_reordered(directory: Path, config: ModelConfig, to: Path) -> None:
    """Copies a directory with one file of weights. Its config comes last: a directory that has one is whole."""
    to.mkdir(parents=True, exist_ok=True)
    tensors = reordered(load_file(directory / "model.safetensors"), config)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(directory / "config.json", to)


def reordered(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights of a plain Llama, by their names, with the dimensions of the residual, of each layer's MLP and of its
    heads' values in a random order."""
    draw = torch.Generator().manual_seed(0)
    residual = torch.randperm(config.hidden_size, generator=draw)
    moved = {name: _with_residual(name, values, residual) for name, values in tensors.items()}
    heads_each = config.num_heads // config.num_kv_heads
    for layer in range(config.num_layers):
        mlp = torch.randperm(config.intermediate_size, generator=draw)
        of_heads = [torch.randperm(config.head_dim, generator=draw) for _ in range(config.num_kv_heads)]
        values = torch.cat([head * config.head_dim + order for head, order in enumerate(of_heads)])
        read = [of_heads[head // heads_each] for head in range(config.num_heads)]
        attended = torch.cat([head * config.head_dim + order for head, order in enumerate(read)])
        for name, rows, columns in (
            ("mlp.gate_proj", mlp, None),
            ("mlp.up_proj", mlp, None),
            ("mlp.down_proj", None, mlp),
            ("self_attn.v_proj", values, None),
            ("self_attn.o_proj", None, attended),
        ):
            key = f"model.layers.{layer}.{name}.weight"
            moved[key] = moved[key][rows] if columns is None else moved[key][:, columns]
    return {name: values.contiguous() for name, values in moved.items()}


def _with_residual(name: str, values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    module = name.split(".")[-2]
    if module in _READ_RESIDUAL:
        return values[:, order]
    assert module in _ADD_TO_RESIDUAL or "norm" in module, f"{name} is of no plain Llama"
    return values[order]
