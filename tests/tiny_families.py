"""Tiny random models of the families beside Llama, every parameter of them random, with windows that texts outgrow.

Of each family, what its config can say that changes its arithmetic or its checkpoints.
"""

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
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
    # Large weights: logits that differ from token to token, so that greedy tokens tell models apart. Where a shape has
    # smaller ones, these would make float32's own rounding larger than what tests allow: transformers', too.
    "initializer_range": 0.3,
}
_SOME_SLIDE = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}


_EXPERTS: dict[str, object] = {"num_local_experts": 6, "num_experts_per_tok": 2}
_QWEN3_EXPERTS: dict[str, object] = {**_EXPERTS, "head_dim": 32, "moe_intermediate_size": 48}
# Scores and logits that its caps bend.
_GEMMA: dict[str, object] = {"num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 24}
_GEMMA2: dict[str, object] = {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0}
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}


@dataclass(frozen=True)
class Shape:
    """A model of transformers' `{family}Config`, with what it has that the plain one has not.

    Attributes:
        model: Transformers' class of the model; default: `{family}ForCausalLM`.
        seed: Of its weights: one whose greedy tokens do not run in a circle.
        embedding_scale: The embedding is multiplied by this: where it weighs most in the residual and is the output
            matrix too, each token is followed by itself.
    """

    family: str
    fields: Mapping[str, object]
    model: str = ""
    seed: int = 0
    embedding_scale: float = 1.0


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
            "initializer_range": 0.1,
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
    "gemma2": Shape(
        "Gemma2", {**_GEMMA2, "initializer_range": 0.2, "sliding_window": WINDOW}, seed=2, embedding_scale=0.1
    ),
    "gemma2-plain": Shape(
        "Gemma2",
        {
            **_GEMMA,
            "initializer_range": 0.15,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
        seed=1,
        embedding_scale=0.1,
    ),
    "gemma3": Shape(
        "Gemma3Text",
        {
            **_GEMMA,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": _LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        model="Gemma3ForCausalLM",
        embedding_scale=0.1,
    ),
    "gpt2": Shape("GPT2", {"n_inner": 96}, model="GPT2LMHeadModel", seed=7),
    "gpt2-unscaled": Shape(
        "GPT2", {"scale_attn_weights": False, "initializer_range": 0.2}, model="GPT2LMHeadModel", seed=1
    ),
    "opt": Shape("OPT", {"init_std": 0.3, "ffn_dim": 96}, seed=2),
    "opt-post": Shape(
        "OPT",
        {
            "num_hidden_layers": 2,
            "init_std": 0.05,
            "ffn_dim": 96,
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 32,
        },
        seed=11,
        embedding_scale=10.0,
    ),
    "opt-plain": Shape("OPT", {"init_std": 0.3, "ffn_dim": 96, "enable_bias": False, "activation_function": "gelu"}),
    "bloom": Shape("Bloom", {"initializer_range": 0.4}, seed=1),
    "bloom-heads": Shape("Bloom", {"hidden_size": 96, "num_attention_heads": 6, "tie_word_embeddings": False}, seed=4),
    "gpt-neox": Shape("GPTNeoX", {}, seed=8),
    "gpt-neox-sequential": Shape(
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "initializer_range": 0.2,
            "hidden_size": 96,
            "num_attention_heads": 2,
            "hidden_act": "gelu_fast",
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
        },
        seed=1,
    ),
    "mixtral": Shape("Mixtral", {**_EXPERTS, "sliding_window": WINDOW}),
    "qwen3-moe": Shape("Qwen3Moe", {**_QWEN3_EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe-some": Shape("Qwen3Moe", {**_QWEN3_EXPERTS, "mlp_only_layers": [1], "tie_word_embeddings": True}),
}


def make_tiny_family(directory: Path, shape: str) -> Path:
    """Writes a random model of `SHAPES[shape]` into `directory`, and returns it."""
    of = SHAPES[shape]
    torch.manual_seed(of.seed)
    config_class: Any = getattr(transformers, f"{of.family}Config")
    # A config keeps what it does not know, and not all families have KV heads, or an MLP of any width.
    plain = {name: value for name, value in _PLAIN.items() if hasattr(config_class(), name)}
    config = config_class(**{**plain, **of.fields})
    model: Any = getattr(transformers, of.model or f"{of.family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        # Transformers starts biases and norms at constants, with which a mix-up of them would pass.
        # Biases less than weights: what they add is the same for all tokens, which then would not tell models apart.
        if parameter.dim() == 1:
            mean, std = (1.0, 0.3) if name.endswith("weight") else (0.0, 0.1)
            torch.nn.init.normal_(parameter, mean=mean, std=std)
    model.get_input_embeddings().weight.data *= of.embedding_scale
    model.save_pretrained(directory)
    return directory
