"""Bodies of OpenAI's completions and chat completions become calls of our client.

A field that is null counts as absent. One that would change the answer and is not supported is an error, never ignored;
ranges of values are the router's to check.

https://platform.openai.com/docs/api-reference/chat/create
https://platform.openai.com/docs/api-reference/completions/create
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from pdmesh.client_calls import GenerateOptions, Message
from pdmesh.errors import InvalidRequestError

Body = Mapping[str, Any]

# To the end of the context: the router cuts it down to what has room there.
_UNTIL_CONTEXT_ENDS = 2**31 - 1
_COMPLETION_MAX_TOKENS = 16

# Bookkeeping of the asker's: these change no answer.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")

# What is not supported, with the one value that asks for nothing.
_ONLY: dict[str, object] = {"stream": False}
_ONLY_CHAT: dict[str, object] = {
    **_ONLY,
    "logprobs": False,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
_ONLY_COMPLETION: dict[str, object] = {**_ONLY, "echo": False, "best_of": 1, "suffix": ""}


@dataclass(frozen=True, slots=True)
class Call:
    """What the client is asked: `text` is None where `options` hold messages or tokens."""

    text: str | None
    options: GenerateOptions
    chat: bool


def chat_call(body: Body) -> Call:
    """Raises InvalidRequestError naming the field."""
    body = _given(body, _ONLY_CHAT)
    _refuse_unknown(body, ("messages", "max_completion_tokens", *_SAMPLING))
    options = _options(body)
    options["max_tokens"] = options.get("max_tokens", _UNTIL_CONTEXT_ENDS)
    if "max_completion_tokens" in body:
        options["max_tokens"] = _integer("max_completion_tokens", body["max_completion_tokens"])
    options["messages"] = _messages(body.get("messages"))
    return Call(None, options, chat=True)


def completion_call(body: Body) -> Call:
    """Raises InvalidRequestError naming the field."""
    body = _given(body, _ONLY_COMPLETION)
    _refuse_unknown(body, ("prompt", *_SAMPLING))
    options = _options(body)
    options["max_tokens"] = options.get("max_tokens", _COMPLETION_MAX_TOKENS)
    prompt = body.get("prompt")
    # A list of one prompt is what some libraries make of a prompt.
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt
    if isinstance(prompt, str):
        return Call(prompt, options, chat=False)
    if isinstance(prompt, list) and prompt and all(type(token_id) is int for token_id in prompt):
        options["tokens"] = prompt
        return Call(None, options, chat=False)
    raise _invalid("prompt", "must be one text, or one list of token ids; put further prompts into lines of their own")


def _given(body: Body, only: Mapping[str, object]) -> Body:
    """The fields that ask for something. Raises InvalidRequestError for those that nobody here can do."""
    given = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    for name, nothing in only.items():
        if name in given and given.pop(name) != nothing:
            raise InvalidRequestError(f"{name} is not supported: leave it out", reason="UNSUPPORTED_FIELD")
    return given


def _refuse_unknown(body: Body, known: tuple[str, ...]) -> None:
    for name in body:
        if name not in known:
            raise InvalidRequestError(f"{name} is not supported: leave it out", reason="UNSUPPORTED_FIELD")


def _options(body: Body) -> GenerateOptions:
    values = {name: read(name, body[name]) for name, read in _SAMPLING.items() if name in body}
    return cast(GenerateOptions, values)


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _invalid("messages", "must be a list of messages, each with role and content")
    return [_message(f"messages[{number}]", turn) for number, turn in enumerate(value)]


def _message(where: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise _invalid(where, "must be an object with role and content")
    for name, value in turn.items():
        if name not in ("role", "content") and value is not None:
            raise InvalidRequestError(f"{where}.{name} is not supported: leave it out", reason="UNSUPPORTED_FIELD")
    role = _text(f"{where}.role", turn.get("role"))
    # What OpenAI calls the system's role since its reasoning models; templates know the old name.
    return Message(role="system" if role == "developer" else role, content=_content(where, turn.get("content")))


def _content(where: str, content: object) -> str:
    if not isinstance(content, list):
        return _text(f"{where}.content", content)
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InvalidRequestError(
                f"{where}.content has a part that is no text: only text is supported", reason="UNSUPPORTED_FIELD"
            )
    return "\n".join(_text(f"{where}.content", part.get("text")) for part in content)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _invalid(name, "must be a text")
    return value


def _integer(name: str, value: object) -> int:
    if type(value) is not int:
        raise _invalid(name, "must be a whole number")
    return value


def _number(name: str, value: object) -> float:
    if type(value) is not int and type(value) is not float:
        raise _invalid(name, "must be a number")
    return value


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _invalid(name, "must be true or false")
    return value


def _stop(name: str, value: object) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise _invalid(name, "must be a text or a list of texts")
    return [_text(name, text) for text in texts]


def _token_ids(name: str, value: object) -> list[int]:
    if not isinstance(value, list):
        raise _invalid(name, "must be a list of token ids")
    return [_integer(name, token_id) for token_id in value]


def _logit_bias(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, dict) or not all(key.isascii() and key.isdigit() for key in value):
        raise _invalid(name, "must be an object of token ids and numbers")
    return {int(key): _number(name, bias) for key, bias in value.items()}


def _invalid(name: str, must: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} {must}", reason="INVALID_FIELD")


_SAMPLING: Mapping[str, Callable[[str, object], object]] = {
    "model": _text,
    "max_tokens": _integer,
    "temperature": _number,
    "top_p": _number,
    "n": _integer,
    "seed": _integer,
    "stop": _stop,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "logit_bias": _logit_bias,
    # Ours, as other servers of open models take them too.
    "top_k": _integer,
    "min_p": _number,
    "repetition_penalty": _number,
    "min_tokens": _integer,
    "stop_token_ids": _token_ids,
    "ignore_eos": _boolean,
    "include_stop_str_in_output": _boolean,
    "cache_salt": _text,
    "priority": _integer,
}
