"""A line of the input: {"custom_id": …, "method": "POST", "url": …, "body": {…}}."""

import json
from dataclasses import dataclass
from typing import Any

from pdmesh.batch.body import Call, chat_call, completion_call
from pdmesh.errors import InvalidRequestError

_CALLS = {"/v1/chat/completions": chat_call, "/v1/completions": completion_call}
_KEYS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class BatchRequest:
    custom_id: str
    call: Call


def parse_line(content: bytes | None) -> BatchRequest:
    """Raises InvalidRequestError for a line that can have no answer; its message says what to mend.

    Args:
        content: None stands for a line too long to be read.
    """
    if content is None:
        raise InvalidRequestError("the line is too long for any message: shorten its prompt", reason="LINE_TOO_LONG")
    line = _object(content)
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not _encodable(custom_id):
        raise _bad_line("custom_id is missing or no text: give each request its own")
    unknown = [name for name in line if name not in _KEYS]
    if unknown:
        raise _bad_line(f"{unknown[0]!r} is no part of a request: it has {', '.join(_KEYS)}")
    if line.get("method") != "POST":
        raise _bad_line(f"method is {_shown(line.get('method'))}: must be 'POST'")
    url = line.get("url")
    make_call = _CALLS.get(url) if isinstance(url, str) else None
    if make_call is None:
        raise InvalidRequestError(f"url is {_shown(url)}: must be one of {', '.join(_CALLS)}", reason="UNKNOWN_URL")
    body = line.get("body")
    if not isinstance(body, dict):
        raise _bad_line("body is missing or no object: put the request's parameters there")
    return BatchRequest(custom_id, make_call(body))


def custom_id_of(content: bytes | None) -> str | None:
    """A line's custom_id, however wrong the rest is; None where it has none that can be told."""
    if content is None:
        return None
    try:
        custom_id = _object(content).get("custom_id")
    except InvalidRequestError:
        return None
    return custom_id if isinstance(custom_id, str) and _encodable(custom_id) else None


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode().rstrip())
    except json.JSONDecodeError as error:
        message = f"the line is no JSON: {error.msg}, column {error.colno}"
        raise InvalidRequestError(message, reason="INVALID_JSON") from error
    # Of text that is not UTF-8, has too long a number, or is nested too deep.
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the line is no JSON: {error}", reason="INVALID_JSON") from error
    if not isinstance(value, dict):
        raise _bad_line("the line is no JSON object")
    return value


def _encodable(text: str) -> bool:
    """JSON can name half a surrogate pair, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:80]


def _bad_line(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, reason="INVALID_LINE")
