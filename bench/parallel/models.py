"""Random Llamas, and models that are as large as what one tensor-parallel rank holds of them."""

from dataclasses import replace
from pathlib import Path

import torch

from bench.engine.checkpoints import bench_cache
from bench.engine.random_llama import llama_config, write_random_llama
from engine.model_config import ModelConfig

# The layers of Llama 3.2 1B, with a vocabulary and an output matrix of their own.
LLAMA_1B = llama_config(
    "random-llama-1b",
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
)
# The shape of SmolLM2-135M: its nine heads can be shared by three ranks.
LLAMA_135M = llama_config(
    "random-llama-135m",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
)


def slice_of(config: ModelConfig, tp: int) -> ModelConfig:
    """A whole model with as many heads, columns and tokens as a rank has of this one: as much work, and no sums."""
    sizes = (config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size)
    assert not any(size % tp for size in sizes), f"{config.name} has no equal parts for {tp} ranks"
    num_heads, num_kv_heads, intermediate_size, vocab_size = (size // tp for size in sizes)
    return replace(
        config,
        name=f"{config.name}-1-of-{tp}",
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
    )


def cached_llama(config: ModelConfig, dtype: str) -> Path:
    """The directory of such a model; drawn once, and kept."""
    directory = bench_cache() / f"{config.name}-{dtype}"
    # It is written last: a directory that has one is whole.
    if not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_random_llama(config, dtype, directory, torch.device("cpu"))
    return directory
