"""A tokenizer built from the metadata of a GGUF file: byte-level BPE, llama.cpp's model "gpt2".

The file names its pre-tokenizer only (`tokenizer.ggml.pre`); what each name means is llama.cpp's to say
(src/llama-vocab.cpp). A name that is not known here is refused: with the wrong one most prompts would still look right.
"""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from pdmesh.errors import ConfigError
from pdmesh.gguf_header import GgufValue

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# One regular expression that cuts text into words.
_SPLITS = {
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "stablelm2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
# These make a word that is in the vocabulary one token, even where no merges lead to it.
_IGNORE_MERGES = ("llama3", "llama-v3", "llama-bpe")
# GPT-2's own expression, after each digit was cut off ...
_GPT2_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
# ... or as it is.
_GPT2 = ("gpt-2", "olmo", "phi-2")

_CONTROL, _USER_DEFINED = 3, 4


def build_gguf_tokenizer(metadata: Mapping[str, GgufValue], path: Path) -> Tokenizer:
    """The tokenizer that `metadata` describes; `path` is for messages.

    Control tokens are special: matched in text, and left out when tokens become text. Adds no BOS by itself.

    Raises:
        ConfigError: for a kind of tokenizer that is not known here, or metadata that make no sense.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ConfigError(
            f"{path}: its tokenizer is of kind {kind!r}; only 'gpt2' (byte-level BPE) can be built from a GGUF file: "
            "put the model's tokenizer.json beside the file"
        )
    pre = metadata.get("tokenizer.ggml.pre", "")
    tokens = _strings(metadata, "tokenizer.ggml.tokens", path)
    merges = [_pair(merge, path) for merge in _strings(metadata, "tokenizer.ggml.merges", path)]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=pre in _IGNORE_MERGES)
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"{path}: vocabulary and merges do not fit together ({error}): get the file anew") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, path)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(kinds, list) or len(kinds) not in (0, len(tokens)):
        raise ConfigError(f"{path}: tokenizer.ggml.token_type does not fit the vocabulary: get the file anew")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, k in zip(tokens, kinds, strict=False)
            if k == _CONTROL
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, k in zip(tokens, kinds, strict=False) if k == _USER_DEFINED]
    )
    return tokenizer


def _pre_tokenizer(pre: GgufValue, path: Path) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _GPT2:
        return gpt2
    if pre in _GPT2_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if isinstance(pre, str) and pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ConfigError(
        f"{path}: its pre-tokenizer {pre!r} is not known here (known: {', '.join([*_GPT2, *_GPT2_DIGITS, *_SPLITS])}): "
        "put the model's tokenizer.json beside the file"
    )


def _strings(metadata: Mapping[str, GgufValue], key: str, path: Path) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ConfigError(
            f"{path}: {key} is missing or no list of strings: put the model's tokenizer.json beside the file"
        )
    return [value for value in values if isinstance(value, str)]


def _pair(merge: str, path: Path) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or " " in right:
        raise ConfigError(f"{path}: {merge!r} is no merge of two tokens: get the file anew")
    return left, right
