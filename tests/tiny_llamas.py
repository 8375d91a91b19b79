"""Tiny random Llamas without a tokenizer, every parameter of them random: a mix-up of any two shows in the tokens."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# What each shape has that the plain one has not.
SHAPES: dict[str, dict[str, object]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide-heads": {"head_dim": 24},
    "even": {"intermediate_size": 128},
    "ragged": {"intermediate_size": 90},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "rope-llama3": {"rope_parameters": _LLAMA3},
    "rope-yarn": {"rope_parameters": _YARN},
}

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
    # Large weights: logits that differ from token to token, so that greedy tokens tell models apart.
    "initializer_range": 0.3,
}


def make_tiny_llama(directory: Path, shape: str) -> Path:
    """Writes a random model of `SHAPES[shape]` into `directory`, and returns it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(_PLAIN | SHAPES[shape])))
    for name, parameter in model.named_parameters():
        # Transformers starts biases and norms at constants, with which a mix-up of them would pass.
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(directory)
    return directory
