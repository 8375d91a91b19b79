"""Tiny random models of the families beside Llama, every parameter of them random, with windows that texts outgrow."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

WINDOW = 20

_PLAIN: dict[str, object] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large weights: logits that differ from token to token, so that greedy tokens tell models apart.
    "initializer_range": 0.3,
}
_SOME_SLIDE = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}


@dataclass(frozen=True)
class Shape:
    """A model of transformers' `{family}Config`, with what it has that the plain one has not."""

    family: str
    fields: Mapping[str, object]


SHAPES = {
    "qwen2": Shape("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": Shape("Qwen2", _SOME_SLIDE),
    "qwen3": Shape("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-narrow": Shape("Qwen3", {"head_dim": 16, "attention_bias": True, **_SOME_SLIDE}),
    "mistral": Shape("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": Shape("Mistral", {"sliding_window": WINDOW}),
    "phi3-window": Shape("Phi3", {"sliding_window": WINDOW}),
    "phi3-partial": Shape(
        "Phi3",
        {
            "hidden_size": 256,
            "initializer_range": 0.15,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
        },
    ),
    "phi3-longrope": Shape(
        "Phi3",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
                "long_factor": [4.0 + pair for pair in range(8)],
            },
        },
    ),
}


def make_tiny_family(directory: Path, shape: str) -> Path:
    """Writes a random model of `SHAPES[shape]` into `directory`, and returns it."""
    torch.manual_seed(0)
    of = SHAPES[shape]
    config: Any = getattr(transformers, f"{of.family}Config")(**{**_PLAIN, **of.fields})
    model: Any = getattr(transformers, f"{of.family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        # Transformers starts biases and norms at constants, with which a mix-up of them would pass.
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(directory)
    return directory
