"""Tiny random Llama checkpoints with a real tokenizer: every shape that the engine must get right, on a laptop."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 320
EOS_TOKEN_ID = 257

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"num_key_value_heads": 2},
    "mha_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa_wide_head": {"num_key_value_heads": 1, "head_dim": 32},
    "rope_linear": {
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "rope_llama3_tied": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE},
    # For 2, 3, 4 or 6 tensor-parallel ranks, of which 4 hold unequally many.
    "many_heads": {
        "hidden_size": 96,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 16,
        "intermediate_size": 384,
    },
}

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_model(directory: Path, shape: str, *, seed: int = 0) -> Path:
    """Writes a random model of `SHAPES[shape]` with a byte-level tokenizer into `directory`, and returns it.

    Weights are drawn wide enough that greedy decoding wanders and logits have clear maxima.
    """
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.35,
        "bos_token_id": 256,
        "eos_token_id": EOS_TOKEN_ID,
        "tie_word_embeddings": False,
    }
    config = LlamaConfig(**{**fields, **SHAPES[shape]})
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of `VOCAB_SIZE` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>"])
    # The rest of the vocabulary are words, so that every token id has a text.
    tokenizer.add_tokens([f" word{index}" for index in range(VOCAB_SIZE - len(vocab) - 2)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|bos|>",
                "eos_token": "<|eos|>",
                "add_bos_token": False,
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
