"""A line of the output: {"id": …, "custom_id": …, "response": {…} | null, "error": {…} | null}.

`id` names the input, by its digest, and the request's place in it. So each line of an output says of itself which
request of which input it answers, and going on needs no other record.
"""

import json
import re
import time
from typing import Any

from pdmesh.errors import MeshError
from pdmesh.generation import GenerationResult

_BEGINNING = re.compile(rb'\{"id": "batch_req_([0-9a-f]{16})_([0-9]+)", ')


def beginning(digest: str, index: int) -> bytes:
    """How the line of request `index` begins."""
    return f'{{"id": "batch_req_{digest}_{index}", '.encode()


def place(line: bytes) -> tuple[str, int] | None:
    """The digest of the input and the request's index in it; None if the line is no result of ours."""
    match = _BEGINNING.match(line)
    return (match[1].decode(), int(match[2])) if match else None


def succeeded(line: bytes) -> bool | None:
    """Whether a line tells of an answer; None where it is not whole."""
    try:
        result = json.loads(line)
    except ValueError:
        return None
    return result.get("error") is None


def torn(line: bytes, digest: str) -> bool:
    """Whether `line` can be the first part of a result of the input with this digest, and no more."""
    begun = f'{{"id": "batch_req_{digest}_'.encode()
    return not line.endswith(b"\n") and (line.startswith(begun) or begun.startswith(line))


def answer_line(digest: str, index: int, custom_id: str, result: GenerationResult, *, chat: bool) -> bytes:
    """Ends with the line's newline, as all lines here."""
    body = chat_body(result) if chat else completion_body(result)
    response = {"status_code": 200, "request_id": result.request_id, "body": body}
    return _line(digest, index, custom_id, response, None)


def error_line(digest: str, index: int, custom_id: str | None, error: MeshError) -> bytes:
    """`code` is the error's reason."""
    return _line(digest, index, custom_id, None, {"code": error.reason, "message": error.message})


def chat_body(result: GenerationResult) -> dict[str, Any]:
    """https://platform.openai.com/docs/api-reference/chat/object"""
    return {
        "id": f"chatcmpl-{result.request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": result.model,
        "choices": [
            {
                "index": completion.index,
                "message": {"role": "assistant", "content": completion.text},
                "logprobs": None,
                "finish_reason": completion.finish_reason.value,
            }
            for completion in result.completions
        ],
        "usage": _usage(result),
    }


def completion_body(result: GenerationResult) -> dict[str, Any]:
    """https://platform.openai.com/docs/api-reference/completions/object"""
    return {
        "id": f"cmpl-{result.request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": result.model,
        "choices": [
            {
                "index": completion.index,
                "text": completion.text,
                "logprobs": None,
                "finish_reason": completion.finish_reason.value,
            }
            for completion in result.completions
        ],
        "usage": _usage(result),
    }


def _usage(result: GenerationResult) -> dict[str, Any]:
    usage = result.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _line(
    digest: str, index: int, custom_id: str | None, response: dict[str, Any] | None, error: dict[str, str] | None
) -> bytes:
    rest = json.dumps({"custom_id": custom_id, "response": response, "error": error}, ensure_ascii=False)
    return beginning(digest, index) + rest[1:].encode() + b"\n"
