"""What each line of a batch becomes, and which files are refused as a whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from pdmesh.batch.input_file import MAX_LINE_BYTES, InputFile
from pdmesh.batch.request_line import custom_id_of, parse_line
from pdmesh.errors import ConfigError, InvalidRequestError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def line(body: Any, url: Any = COMPLETIONS, **fields: Any) -> bytes:
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body, **fields}).encode()


def options(body: dict[str, Any], url: str = COMPLETIONS) -> Any:
    return parse_line(line(body, url)).call.options


def test_a_completion() -> None:
    body = {
        "model": "m", "prompt": "Hi", "max_tokens": 5, "temperature": 0, "top_p": 0.5, "n": 2, "seed": 3, "stop": "x",
        "presence_penalty": 1, "frequency_penalty": -1.5, "logit_bias": {"7": -100}, "top_k": 4, "ignore_eos": True,
        "stop_token_ids": [1, 2], "user": "u", "stream": False, "suffix": None, "echo": False, "best_of": 1,
    }  # fmt: skip
    request = parse_line(line(body))
    assert (request.custom_id, request.call.text, request.call.chat) == ("a", "Hi", False)
    assert request.call.options == {
        "model": "m", "max_tokens": 5, "temperature": 0, "top_p": 0.5, "n": 2, "seed": 3, "stop": ["x"],
        "presence_penalty": 1, "frequency_penalty": -1.5, "logit_bias": {7: -100}, "top_k": 4, "ignore_eos": True,
        "stop_token_ids": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6]]])
def test_a_prompt_of_token_ids(prompt: Any) -> None:
    call = parse_line(line({"prompt": prompt})).call
    assert (call.text, call.options["tokens"]) == (None, [5, 6])


def test_a_chat() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": None},
    ]
    call = parse_line(line({"messages": messages, "max_tokens": 3, "max_completion_tokens": 4}, CHAT)).call
    assert (call.text, call.chat, call.options["max_tokens"]) == (None, True, 4)
    assert call.options["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo"},
    ]


def test_without_a_limit_a_completion_is_short_and_a_chat_ends_with_the_context_as_openai_has_it() -> None:
    assert options({"prompt": "x"})["max_tokens"] == 16
    assert options({"messages": [{"role": "user", "content": "x"}]}, CHAT)["max_tokens"] == 2**31 - 1


def test_a_sampled_request_without_a_seed_leaves_it_to_the_router() -> None:
    assert "seed" not in options({"prompt": "x", "seed": None})


@pytest.mark.parametrize(
    ("content", "reason", "says"),
    [
        (b'{"custom_id": "a"', "INVALID_JSON", "column 18"),
        (b"\xff\xfe{}", "INVALID_JSON", "utf-8"),
        (b"[" * 100_000, "INVALID_JSON", "recursion"),
        (b"[1]", "INVALID_LINE", "no JSON object"),
        (None, "LINE_TOO_LONG", "shorten"),
        (line({"prompt": "x"}, custom_id=3), "INVALID_LINE", "custom_id"),
        (line({"prompt": "x"}, custom_id="\ud800"), "INVALID_LINE", "custom_id"),
        (line({"prompt": "x"}, method="GET"), "INVALID_LINE", "method is 'GET'"),
        (line({"prompt": "x"}, priority=3), "INVALID_LINE", "'priority' is no part"),
        (line({"input": "x"}, "/v1/embeddings"), "UNKNOWN_URL", "url is '/v1/embeddings'"),
        (line({"prompt": "x"}, None), "UNKNOWN_URL", "url is missing"),
        (line({"prompt": "x"}, []), "UNKNOWN_URL", "url is"),
        (line("x"), "INVALID_LINE", "body"),
        (line({"prompt": "x", "stream": True}), "UNSUPPORTED_FIELD", "stream is not supported"),
        (line({"prompt": "x", "messages": []}), "UNSUPPORTED_FIELD", "messages is not supported"),
        (line({"prompt": "x", "max_token": 3}), "UNSUPPORTED_FIELD", "max_token is not supported"),
        (line({"prompt": ["x", "y"]}), "INVALID_FIELD", "prompt must be one text"),
        (line({"prompt": [1, True]}), "INVALID_FIELD", "prompt must be one text"),
        (line({}), "INVALID_FIELD", "prompt must be one text"),
        (line({"prompt": "x", "temperature": "0"}), "INVALID_FIELD", "temperature must be a number"),
        (line({"prompt": "x", "max_tokens": 2.5}), "INVALID_FIELD", "max_tokens must be a whole number"),
        (line({"prompt": "x", "n": True}), "INVALID_FIELD", "n must be a whole number"),
        (line({"prompt": "x", "stop": [1]}), "INVALID_FIELD", "stop must be a text"),
        (line({"prompt": "x", "logit_bias": {"a": 1}}), "INVALID_FIELD", "logit_bias"),
        (line({"messages": []}, CHAT), "INVALID_FIELD", "messages must be a list"),
        (line({"messages": ["x"]}, CHAT), "INVALID_FIELD", "messages[0] must be an object"),
        (line({"messages": [{"role": "user"}]}, CHAT), "INVALID_FIELD", "messages[0].content must be a text"),
        (line({"messages": [{"content": "x"}]}, CHAT), "INVALID_FIELD", "messages[0].role must be a text"),
        (
            line({"messages": [{"role": "user", "content": "x", "name": "n"}]}, CHAT),
            "UNSUPPORTED_FIELD",
            "messages[0].name",
        ),
        (
            line({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, CHAT),
            "UNSUPPORTED_FIELD",
            "only text",
        ),
        (
            line({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}, CHAT),
            "UNSUPPORTED_FIELD",
            "response_format",
        ),
    ],
)
def test_a_line_that_can_have_no_answer_says_what_to_mend(content: bytes | None, reason: str, says: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse_line(content)
    assert raised.value.reason == reason
    assert says in raised.value.message


def test_the_custom_id_of_a_bad_line_is_told_where_it_can_be() -> None:
    assert custom_id_of(line({}, "/nowhere")) == "a"
    assert custom_id_of(b"{") is custom_id_of(b"[]") is custom_id_of(b"{}") is custom_id_of(None) is None


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    return path


def test_blank_lines_are_no_requests_and_a_windows_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"custom_id": "a"}\r\n\r\n  \n{"custom_id": "b"}')
    with InputFile(path) as source:
        assert source.num_requests == 2
        found = [(line.index, line.number, custom_id_of(line.content)) for line in source.lines()]
        assert found == [(0, 1, "a"), (1, 4, "b")]
        assert [line.index for line in source.lines(1)] == [1]


def test_a_line_beyond_all_bounds_keeps_its_place_and_not_its_content(tmp_path: Path) -> None:
    longest = b"x" * MAX_LINE_BYTES
    with InputFile(write(tmp_path, b"{}\n" + longest * 2 + b"yy\n" + longest + b"\n{}\n")) as source:
        lengths = [line.content and len(line.content.rstrip()) for line in source.lines()]
    assert lengths == [2, None, MAX_LINE_BYTES, 2]


def test_a_file_that_is_written_to_meanwhile_gives_no_more_lines(tmp_path: Path) -> None:
    path = write(tmp_path, b"{}\n{}\n")
    with InputFile(path) as source:
        lines = source.lines()
        next(lines)
        with path.open("ab") as file:
            file.write(b"{}\n")
        with pytest.raises(ConfigError, match="was changed while it was run"):
            next(lines)


def test_the_digest_is_that_of_every_byte(tmp_path: Path) -> None:
    digests = set()
    for content in (b"{}\n{}\n", b"{}\n{}", b"{}\n\n{}\n", b"{}\n{ }\n"):
        with InputFile(write(tmp_path, content)) as source:
            digests.add(source.digest)
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no request"),
        (b"\n \n", "holds no request"),
        (b'{"custom_id": "a"}\n\n{"custom_id": "b"}\n{"custom_id": "a"}\n', "line 4 has the custom_id 'a' of line 1"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        InputFile(write(tmp_path, content))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ConfigError, match="no such file"):
            InputFile(path)
