"""The text side of a model, tiny: a byte-level tokenizer in a model directory, with no weights beside it."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
SPECIAL = ("<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

BOS_ID, END_ID = 256 + len(MERGES), 257 + len(MERGES)
VOCAB_SIZE = 256 + len(MERGES) + len(SPECIAL)


def tiny_tokenizer() -> Tokenizer:
    """256 bytes, a few merges, special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: token_id for token_id, token in enumerate([*alphabet, *(a + b for a, b in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def make_text_model(directory: Path) -> Path:
    """Writes the model's text files to `directory` and returns it. Its name is the directory's."""
    directory.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "bos_token": "<|bos|>",
            "eos_token": {"content": "<|end|>"},
            "add_bos_token": False,
            "chat_template": CHAT_TEMPLATE,
        },
        "config.json": {"architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB_SIZE, "eos_token_id": END_ID},
    }
    for name, fields in files.items():
        (directory / name).write_text(json.dumps(fields))
    return directory
