"""A model's text: tokens from text and chat messages, text from tokens, and which tokens end an answer."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pdmesh.errors import ConfigError, InvalidRequestError
from pdmesh.gguf_header import GgufValue, read_gguf_header
from router.text.chat_template import ChatTemplate
from router.text.detokenizer import TokenBytes
from router.text.gguf_tokenizer import build_gguf_tokenizer
from router.text.model_files import ModelFiles, find_model_files

# Names that tokenizer_config.json gives to special tokens and templates know them by.
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Ends of a turn that GGUF files often leave out of their metadata.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")


class TextModel:
    """A tokenizer and what belongs to it. Thread-safe: nothing changes after construction.

    Args:
        name: The model's name.
        tokenizer: Truncates and pads nothing.
        eos_token_ids: Any of these ends an answer.
        bos_token_id: Begins a text (not a chat: templates write it themselves) where `add_bos` says so.
        add_bos: None leaves it to the tokenizer's own post-processor.
        chat_template: None where the model has none.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        bos_token_id: int | None = None,
        add_bos: bool | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.name = name
        self.eos_token_ids = tuple(sorted(set(eos_token_ids)))
        self.token_bytes = TokenBytes(tokenizer)
        self._tokenizer = tokenizer
        self._bos_token_id = bos_token_id
        self._add_bos = add_bos
        self._chat_template = chat_template

    @property
    def num_tokens(self) -> int:
        """Ids from 0 up to this one have tokens; the model may have more rows."""
        return len(self.token_bytes.table)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that is completed as it stands."""
        token_ids = self._tokenizer.encode(text, add_special_tokens=self._add_bos is None).ids
        if self._add_bos and self._bos_token_id is not None and token_ids[:1] != [self._bos_token_id]:
            token_ids.insert(0, self._bos_token_id)
        return token_ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, ready for the assistant's answer. Raises InvalidRequestError."""
        if self._chat_template is None:
            raise InvalidRequestError(
                f"{self.name} has no chat template: send text instead of messages",
                reason="NO_CHAT_TEMPLATE",
                stage="admission",
            )
        return self._tokenizer.encode(self._chat_template.render(messages), add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens spelled out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def load_text_model(source: str) -> TextModel:
    """Loads the text side of the model that `source` names: a model directory, a .gguf file or a Hub id.

    A tokenizer.json counts before what a .gguf file says.

    Raises:
        ConfigError: naming the file and what to do.
    """
    files = find_model_files(source)
    if files.tokenizer_json is not None:
        return _from_tokenizer_json(files, files.tokenizer_json)
    if files.gguf is None:
        raise ConfigError(f"{source}: holds neither tokenizer.json nor a .gguf file")
    return _from_gguf(files.name, files.gguf)


def _from_tokenizer_json(files: ModelFiles, path: Path) -> TextModel:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"{path}: no tokenizer ({error}): get the file anew") from error
    # Both are settings of whoever trained it, saved along.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    metadata = read_gguf_header(files.gguf).metadata if files.gguf is not None else {}
    special = {name: _token_text(files.tokenizer_config.get(name)) for name in _SPECIAL_NAMES}
    special_tokens = {name: text for name, text in special.items() if text}
    eos = [*_ids(files.generation_config, "eos_token_id"), *_ids(files.config, "eos_token_id")]
    eos += _token_ids(tokenizer, special_tokens.get("eos_token"))
    bos = _token_ids(tokenizer, special_tokens.get("bos_token"))
    add_bos = files.tokenizer_config.get("add_bos_token")
    template = files.chat_template or _default_template(files.tokenizer_config.get("chat_template"))
    if template is None:
        template = _optional_text(metadata.get("tokenizer.chat_template"))
    return TextModel(
        files.name,
        tokenizer,
        eos_token_ids=[*eos, *_gguf_eos(metadata)],
        bos_token_id=bos[0] if bos else None,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        chat_template=ChatTemplate(template, special_tokens, str(path.parent)) if template else None,
    )


def _from_gguf(name: str, path: Path) -> TextModel:
    metadata = read_gguf_header(path).metadata
    tokenizer = build_gguf_tokenizer(metadata, path)
    ids = {kind: metadata.get(f"tokenizer.ggml.{key}_token_id") for kind, key in _GGUF_SPECIAL.items()}
    texts = {kind: tokenizer.id_to_token(i) for kind, i in ids.items() if isinstance(i, int)}
    special_tokens = {kind: text for kind, text in texts.items() if text is not None}
    turn_ends = [token_id for text in _TURN_ENDS for token_id in _token_ids(tokenizer, text)]
    template = _optional_text(metadata.get("tokenizer.chat_template"))
    bos = ids["bos_token"]
    return TextModel(
        name,
        tokenizer,
        eos_token_ids=[*_gguf_eos(metadata), *turn_ends],
        bos_token_id=bos if isinstance(bos, int) else None,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(metadata))),
        chat_template=ChatTemplate(template, special_tokens, str(path)) if template else None,
    )


_GGUF_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _adds_bos(metadata: Mapping[str, GgufValue]) -> bool:
    """What llama.cpp does where the file does not say."""
    return metadata.get("tokenizer.ggml.pre") in ("llama3", "llama-v3", "llama-bpe")


def _gguf_eos(metadata: Mapping[str, GgufValue]) -> list[int]:
    values = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return [value for value in values if isinstance(value, int)]


def _ids(fields: Mapping[str, Any], key: str) -> list[int]:
    value = fields.get(key)
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)]


def _token_ids(tokenizer: Tokenizer, text: str | None) -> list[int]:
    token_id = tokenizer.token_to_id(text) if text else None
    return [] if token_id is None else [token_id]


def _token_text(value: Any) -> str | None:
    """A token as tokenizer_config.json writes it: its text, or an object that holds it."""
    return _optional_text(value.get("content") if isinstance(value, dict) else value)


def _optional_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _default_template(value: Any) -> str | None:
    """The template itself, or the one named "default" of several."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        return _optional_text(named.get("default"))
    return _optional_text(value)
