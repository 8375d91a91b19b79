"""One completion: each index once, and what belongs to a token stays with it."""

from collections.abc import Sequence
from typing import Any

import pytest

from pdmesh.errors import UnavailableError
from pdmesh.sampling import SamplingParams
from pdmesh.v1 import common_pb2, decode_pb2, inference_pb2
from router.completion import Completion
from router.text.detokenizer import TokenBytes
from router.text.stop_strings import StopStrings
from tests.tiny_text import END_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOKEN_BYTES = TokenBytes(TOKENIZER)


def completion(index: int = 0, **params: Any) -> Completion:
    sampling = SamplingParams(**{"stop_token_ids": (END_ID,), **params})
    return Completion(index, 5, sampling, StopStrings(sampling.stop) if sampling.stop else None, TOKEN_BYTES)


def sent(first: int, token_ids: Sequence[int], **fields: Any) -> decode_pb2.DecodeTokens:
    logprobs = [common_pb2.TokenLogprob(token_id=token_id, logprob=-token_id) for token_id in token_ids]
    return decode_pb2.DecodeTokens(first_token_index=first, token_ids=token_ids, logprobs=logprobs, **fields)


def accepted(to: Completion, first: int, token_ids: Sequence[int], **fields: Any) -> inference_pb2.GenerateChunk:
    chunk = to.accept(sent(first, token_ids, **fields))
    assert chunk is not None
    return chunk


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def test_what_was_delivered_is_dropped_with_all_that_belongs_to_it() -> None:
    to = completion()
    accepted(to, 0, [10, 11, 12], cached_tokens=16)
    assert to.accept(sent(0, [10, 11])) is None
    chunk = accepted(to, 1, [11, 12, 13, 14], cached_tokens=64)
    assert (chunk.first_token_index, list(chunk.token_ids)) == (3, [13, 14])
    assert [entry.token_id for entry in chunk.logprobs] == [13, 14]
    assert chunk.text == TOKENIZER.decode([13, 14])
    assert chunk.usage == common_pb2.Usage(prompt_tokens=5, completion_tokens=5, cached_tokens=16)
    assert to.token_ids == [10, 11, 12, 13, 14]


def test_a_gap_is_an_error_and_leaves_no_trace() -> None:
    to = completion()
    accepted(to, 0, [10])
    with pytest.raises(UnavailableError) as caught:
        to.accept(sent(2, [12]))
    assert caught.value.reason == "TOKEN_GAP"
    assert to.token_ids == [10]


@pytest.mark.parametrize(("index", "told"), [(0, True), (1, False)])
def test_prompt_logprobs_come_once(index: int, told: bool) -> None:
    to = completion(index)
    prompt = [common_pb2.TokenLogprob(token_id=1)]
    assert bool(accepted(to, 0, [10], prompt_logprobs=prompt).prompt_logprobs) is told
    assert not accepted(to, 1, [11], prompt_logprobs=prompt).prompt_logprobs


def test_a_stop_token_is_no_text_though_it_has_some() -> None:
    to = completion(stop_token_ids=(72,), min_tokens=2)
    assert accepted(to, 0, [72]).text == TOKENIZER.decode([72]), "too early to stop anything"
    assert accepted(to, 1, [70, 72]).text == TOKENIZER.decode([70])


@pytest.mark.parametrize(
    ("token_ids", "params", "reason", "matched"),
    [
        ([10, END_ID], {}, common_pb2.FINISH_REASON_STOP, END_ID),
        ([10, 11], {"max_tokens": 2}, common_pb2.FINISH_REASON_LENGTH, None),
        # As the workers have it: a stop token counts before the length.
        ([10, END_ID], {"max_tokens": 2}, common_pb2.FINISH_REASON_STOP, END_ID),
        ([10, END_ID], {"min_tokens": 2}, common_pb2.FINISH_REASON_UNSPECIFIED, None),
        ([10, 11], {}, common_pb2.FINISH_REASON_UNSPECIFIED, None),
        ([], {}, common_pb2.FINISH_REASON_UNSPECIFIED, None),
    ],
)
def test_its_tokens_tell_whether_it_is_over(
    token_ids: list[int], params: dict[str, Any], reason: int, matched: int | None
) -> None:
    to = completion(**params)
    to.accept(sent(0, token_ids))
    to.end_if_due()
    assert (to.finish_reason, to.matched_token_id) == (reason, matched)
    assert to.resume_point() == decode_pb2.ResumePoint(output_token_ids=token_ids, finished=bool(reason))


def test_a_stop_string_cuts_tokens_where_it_is_complete() -> None:
    to = completion(stop=("lo w",))
    token_ids = ids("hello world")
    chunk = accepted(to, 0, token_ids)
    assert chunk.text == "hel"
    assert TOKENIZER.decode(list(chunk.token_ids)) == "hello w"
    assert len(chunk.logprobs) == len(chunk.token_ids) == chunk.usage.completion_tokens
    assert to.finish_reason == common_pb2.FINISH_REASON_STOP
    assert to.rest() is None
    assert to.accept(sent(len(chunk.token_ids), [10])) is None, "it is over"


def test_the_rest_is_what_was_held_back() -> None:
    to = completion(stop=("STOP",))
    half = [ids("é")[0]]
    assert accepted(to, 0, [*ids("x ST"), *half]).text == "x "
    to.end(common_pb2.FINISH_REASON_LENGTH, None)
    rest = to.rest()
    assert rest is not None
    assert (rest.text, list(rest.token_ids), rest.first_token_index) == ("ST\ufffd", [], 5)
    assert to.rest() is None
