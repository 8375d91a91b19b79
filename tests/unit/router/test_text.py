"""Tokens and text: detokenizing in pieces, chat templates, and tokenizers from model directories and GGUF files."""

import contextlib
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pdmesh.errors import ConfigError, InvalidRequestError
from pdmesh.gguf_header import read_gguf_header
from pdmesh.model_source import model_name
from router.text.chat_template import ChatTemplate
from router.text.detokenizer import Detokenizer, TokenBytes
from router.text.model_files import find_model_files
from router.text.tokenizer import load_text_model
from tests.tiny_text import BOS_ID, END_ID, MERGES, SPECIAL, VOCAB_SIZE, make_text_model, tiny_tokenizer

BYTE_LEVEL = tiny_tokenizer()
BYTE_LEVEL_BYTES = TokenBytes(BYTE_LEVEL)


def in_pieces(token_bytes: TokenBytes, pieces: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(token_bytes)
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.flush()]


@given(st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6), max_size=20))
def test_any_tokens_in_any_pieces_are_the_text_of_the_whole(pieces: list[list[int]]) -> None:
    """Also bytes that are no UTF-8."""
    whole = [token_id for piece in pieces for token_id in piece]
    assert "".join(in_pieces(BYTE_LEVEL_BYTES, pieces)) == BYTE_LEVEL.decode(whole, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_no_piece_holds_half_a_character(text: str) -> None:
    token_ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    pieces = in_pieces(BYTE_LEVEL_BYTES, [[token_id] for token_id in token_ids])
    assert "".join(pieces) == "".join(part for part in _without_special(text))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def _without_special(text: str) -> list[str]:
    for token in SPECIAL:
        text = text.replace(token, "")
    return [text]


def test_leading_spaces_stay() -> None:
    token_ids = BYTE_LEVEL.encode(" hello hello", add_special_tokens=False).ids
    assert in_pieces(BYTE_LEVEL_BYTES, [[token_id] for token_id in token_ids]) == [" hello", " hello", ""]


def test_ids_without_a_token_stand_for_nothing() -> None:
    assert in_pieces(BYTE_LEVEL_BYTES, [[VOCAB_SIZE + 5], [72]])[0] == ""


def test_sentencepiece_with_byte_fallback() -> None:
    tokens = ["<unk>", "▁Hi", "▁", "there", *(f"<0x{byte:02X}>" for byte in "é😀".encode())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = in_pieces(TokenBytes(tokenizer), [[token_id] for token_id in range(1, len(tokens))])
    assert pieces == [" Hi", " ", "there", "", "é", "", "", "", "😀", ""]


def test_a_decoder_that_is_not_known_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="WordPiece"):
        TokenBytes(tokenizer)


def test_model_directory(tmp_path: Path) -> None:
    text = load_text_model(str(make_text_model(tmp_path / "tiny")))
    assert text.name == "tiny"
    assert text.eos_token_ids == (END_ID,)
    assert text.num_tokens == VOCAB_SIZE
    assert text.decode(text.encode("hello é")) == "hello é"
    chat = text.encode_chat([{"role": "system", "content": "hello"}, {"role": "user", "content": "he"}])
    assert text.decode(chat) == "<|system|>hello<|end|><|user|>he<|end|><|assistant|>"
    assert text.token_bytes.of(chat) == b"hellohe"


@pytest.mark.parametrize("add_bos", [True, False, None])
def test_bos_as_the_config_says(tmp_path: Path, add_bos: bool | None) -> None:
    directory = make_text_model(tmp_path / "tiny")
    _change(directory / "tokenizer_config.json", add_bos_token=add_bos)
    token_ids = load_text_model(str(directory)).encode("he")
    assert (token_ids[0] == BOS_ID) is bool(add_bos)
    assert load_text_model(str(directory)).encode("<|bos|>he").count(BOS_ID) == 1


def test_end_tokens_of_all_files_count(tmp_path: Path) -> None:
    directory = make_text_model(tmp_path / "tiny")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    _change(directory / "config.json", eos_token_id=4)
    assert load_text_model(str(directory)).eos_token_ids == (3, 4, 5, END_ID)


def test_settings_of_training_do_not_cut_prompts(tmp_path: Path) -> None:
    directory = make_text_model(tmp_path / "tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(directory / "tokenizer.json"))
    text = load_text_model(str(directory))
    assert len(text.encode("x" * 30)) == 30
    assert len(text.encode("x")) == 1


@pytest.mark.parametrize("where", ["file", "list"])
def test_where_chat_templates_stand(tmp_path: Path, where: str) -> None:
    directory = make_text_model(tmp_path / "tiny")
    named = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": "hello"}]
    _change(directory / "tokenizer_config.json", chat_template=named if where == "list" else "wrong")
    if where == "file":
        (directory / "chat_template.jinja").write_text("hello")
    text = load_text_model(str(directory))
    assert text.decode(text.encode_chat([{"role": "user", "content": "x"}])) == "hello"


def test_no_chat_template(tmp_path: Path) -> None:
    directory = make_text_model(tmp_path / "tiny")
    _change(directory / "tokenizer_config.json", chat_template=None)
    with pytest.raises(InvalidRequestError, match="send text instead"):
        load_text_model(str(directory)).encode_chat([{"role": "user", "content": "x"}])


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>a<b"),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m['role'] }}{% endfor %}", "user"),
        ("{% generation %}x{% endgeneration %}y", "xy"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "a<b"}]'),
        ("{{ add_generation_prompt }}{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "True2"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% if tools is defined %}tools{% endif %}none", "none"),
    ],
)
def test_templates_render_as_they_were_written_for(template: str, expected: str) -> None:
    assert ChatTemplate(template, {"bos_token": "<s>"}, "tiny").render([{"role": "user", "content": "a<b"}]) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[7].content }}",
    ],
)
def test_templates_refuse_and_reach_nothing_outside(template: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(template, {}, "tiny").render([{"role": "user", "content": "a"}])
    assert caught.value.reason == "CHAT_TEMPLATE_REFUSED"


def test_a_template_that_is_no_jinja_ends_the_start() -> None:
    with pytest.raises(ConfigError, match=r"^tiny: the chat template is no valid Jinja"):
        ChatTemplate("{% if %}", {}, "tiny")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"a":' * 100_000),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff\xfe\x00"),
        ("tokenizer_config.json", b'{"a":' * 100_000),
        ("config.json", b"[" * 100_000),
        ("chat_template.jinja", b"\xff\xfe{{"),
        ("chat_template.jinja", b"{% for %}"),
        ("chat_template.jinja", b"{{" + b"(" * 100_000),
    ],
)
def test_a_broken_file_is_named_in_one_line(tiny_model: Path, tmp_path: Path, name: str, content: bytes) -> None:
    directory = shutil.copytree(tiny_model, tmp_path / "broken")
    (directory / name).write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_text_model(str(directory))
    assert refused.value.message.startswith(str(directory))
    assert re.search("get the files? anew$", refused.value.message)
    assert "\n" not in refused.value.message


# GGUF


def gguf(path: Path, **changes: Any) -> Path:
    """Writes the tiny tokenizer as llama.cpp would, with `changes` to its metadata (None leaves a key out)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(left + right for left, right in MERGES), *SPECIAL]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - len(SPECIAL)) + [3] * len(SPECIAL),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in MERGES],
        "tokenizer.ggml.bos_token_id": BOS_ID,
        "tokenizer.ggml.eos_token_id": END_ID,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ eos_token }}{{ messages[0]['content'] }}",
        "llama.rope.freq_base": 1e4,
        **{f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()},
    }
    pairs = [_string(key) + _value(value) for key, value in metadata.items() if value is not None]
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(pairs)) + b"".join(pairs))
    return path


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
        case list() if isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        case list():
            return struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
        case _:
            raise AssertionError(value)


def test_metadata_are_read_back(tmp_path: Path) -> None:
    metadata = read_gguf_header(gguf(tmp_path / "tiny.gguf")).metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == END_ID
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["llama.rope.freq_base"] == 1e4
    assert metadata["tokenizer.ggml.merges"] == [f"{left} {right}" for left, right in MERGES]


@given(st.data())
def test_no_prefix_and_no_flipped_byte_of_a_file_does_harm(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", ggml__tokens=["a", "b"], ggml__token_type=[1, 1])
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    path.write_bytes(content)
    # Nothing else is raised, and nothing large allocated.
    with contextlib.suppress(ConfigError):
        read_gguf_header(path)


def test_gguf_tokenizes_like_the_tokenizer_it_was_made_of(tmp_path: Path) -> None:
    path = gguf(tmp_path / "tiny.gguf")
    text = load_text_model(str(path))
    assert (text.name, text.eos_token_ids, text.num_tokens) == ("tiny", (END_ID,), VOCAB_SIZE)
    for sample in ("hello hello", "  é😀\n\n42 it's", "<|user|>hello<|end|>", ""):
        assert text.encode(sample) == BYTE_LEVEL.encode(sample).ids
    assert text.decode(text.encode_chat([{"role": "user", "content": "hello"}])) == "<|end|>hello"
    assert text.token_bytes.of([END_ID]) == b"", "control tokens are no text"


def test_gguf_adds_bos_where_it_says_so(tmp_path: Path) -> None:
    text = load_text_model(str(gguf(tmp_path / "tiny.gguf", ggml__add_bos_token=True)))
    assert text.encode("hello")[0] == BOS_ID


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "a 123  b's", ["a", " 123", " ", " b", "'s"]),
        ("smollm", "a 123  b's", ["a", " ", "1", "2", "3", " ", " b", "'s"]),
        ("llama-bpe", "a 1234  B'S\n\n x", ["a", " ", "123", "4", " ", " B", "'S", "\n\n", " x"]),
        ("qwen2", "a 12  B'S\n\n x", ["a", " ", "1", "2", " ", " B", "'S", "\n\n", " x"]),
    ],
)
def test_each_pre_tokenizer_cuts_words_its_own_way(tmp_path: Path, pre: str, text: str, words: list[str]) -> None:
    """Where all that stands side by side may merge, tokens show the cuts."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = ["".join(part for part, _ in byte_level.pre_tokenize_str(word)) for word in words]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = list(alphabet), []
    # Everything in the text could merge, from the left on: only the cuts keep words apart.
    whole = byte_level.pre_tokenize_str(text)[0][0]
    for start in range(len(whole)):
        for end in range(start + 2, len(whole) + 1):
            piece = whole[start:end]
            if piece not in vocab:
                vocab.append(piece)
                merges.append(f"{piece[:-1]} {piece[-1]}")
    path = gguf(tmp_path / "t.gguf", ggml__pre=pre, ggml__tokens=vocab, ggml__merges=merges, ggml__token_type=None,
                ggml__bos_token_id=None, ggml__eos_token_id=None)  # fmt: skip
    token_ids = load_text_model(str(path)).encode(text)
    assert [vocab[token_id] for token_id in token_ids] == spelled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__pre": "brand-new"}, "put the model's tokenizer.json beside the file"),
        ({"ggml__pre": None}, "put the model's tokenizer.json beside the file"),
        ({"ggml__model": "llama"}, "put the model's tokenizer.json beside the file"),
        ({"ggml__tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"ggml__merges": ["nospace"]}, "no merge of two tokens"),
        ({"ggml__merges": ["zz yy"]}, "do not fit together"),
        ({"ggml__token_type": [1]}, "token_type does not fit"),
    ],
)
def test_what_cannot_be_built_is_refused_with_advice(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_text_model(str(gguf(tmp_path / "tiny.gguf", **changes)))


def test_what_a_model_may_be_named_by(tmp_path: Path) -> None:
    directory = tmp_path / "gguf-dir"
    directory.mkdir()
    file = gguf(directory / "tiny.Q4_1.gguf")
    assert model_name(str(file)) == "tiny.Q4_1"
    assert model_name(str(directory)) == "tiny.Q4_1", "what it holds says more than what it is called"
    assert model_name("org/model-1.5") == "org/model-1.5"
    assert load_text_model(str(directory)).encode("hello") == load_text_model(str(file)).encode("hello")
    # A tokenizer.json beside the file counts first.
    make_text_model(directory)
    assert find_model_files(str(file)).tokenizer_json == directory / "tokenizer.json"
    assert find_model_files(str(file)).name == "tiny.Q4_1"


def test_what_is_no_model_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or directory"):
        load_text_model(str(tmp_path / "nothing" / "here" / "x.gguf"))
    with pytest.raises(ConfigError, match="add the model's tokenizer"):
        load_text_model(str(tmp_path))
    for name in ("a", "b"):
        gguf(tmp_path / f"{name}.gguf")
    with pytest.raises(ConfigError, match="name the one to serve"):
        load_text_model(str(tmp_path))
