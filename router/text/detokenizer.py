"""Tokens become text piece by piece: never half a character, never a lost space.

Each token stands for bytes of its own, whatever its neighbours, so a table of them and an incremental UTF-8 decoder do
in constant time per token what decoding from the beginning would. Special tokens stand for no text. Bytes that are no
UTF-8 become U+FFFD, as the reference decoder has it.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from pdmesh.errors import ConfigError

_new_decoder = codecs.getincrementaldecoder("utf-8")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """What each token of a vocabulary stands for, in bytes. Shared by all requests.

    Raises:
        ConfigError: if the tokenizer's decoder is neither byte-level nor SentencePiece's.
    """

    __slots__ = ("table",)

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        spell = _speller(tokenizer)
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.table = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, token_id in vocab.items():
            self.table[token_id] = spell(token)
        for token_id, entry in added.items():
            self.table[token_id] = b"" if entry.special else entry.content.encode()

    def of(self, token_ids: Sequence[int]) -> bytes:
        """The bytes of `token_ids`. Models have rows for ids that no token has: these stand for nothing."""
        table = self.table
        return b"".join([table[token_id] for token_id in token_ids if token_id < len(table)])


class Detokenizer:
    """The text of one completion."""

    __slots__ = ("_decode", "_token_bytes")

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decode = _new_decoder("replace").decode

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` add; an incomplete character waits for the next."""
        return self._decode(self._token_bytes.of(token_ids))

    def flush(self) -> str:
        """What an incomplete character at the end comes to."""
        return self._decode(b"", True)


def _speller(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()

        def spell_byte_level(token: str) -> bytes:
            try:
                return bytes([alphabet[character] for character in token])
            except KeyError:
                return token.encode()

        return spell_byte_level
    if kinds & {"ByteFallback", "Metaspace"}:
        return _spell_sentencepiece
    raise ConfigError(
        f"the tokenizer's decoder, {sorted(kinds)}, is neither byte-level nor SentencePiece's: not supported"
    )


def _spell_sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
