"""Events parsed from the wire, and what they add up to."""

import pytest

from pdmesh.errors import InternalError
from pdmesh.generation import Chunk, Complete, EventCollector, RequestReport, Started, Usage, event_from_pb
from pdmesh.types import FinishReason, TokenLogprob
from pdmesh.v1 import common_pb2, inference_pb2

STARTED = Started("r", "m", seed=1, prompt_tokens=2)


def complete(index: int) -> Complete:
    return Complete(index, FinishReason.LENGTH, None, Usage(2, 1, 0), RequestReport())


def test_a_chunk_with_logprobs() -> None:
    logprob = common_pb2.TokenLogprob(token_id=5, logprob=-0.5, top_token_ids=[5, 6], top_logprobs=[-0.5, -1.5])
    message = inference_pb2.GenerateChunk(
        index=1, first_token_index=4, token_ids=[5], text="é", logprobs=[logprob], prompt_logprobs=[logprob],
        usage=common_pb2.Usage(prompt_tokens=3, completion_tokens=5, cached_tokens=1),
    )  # fmt: skip
    parsed = TokenLogprob(5, -0.5, ((5, -0.5), (6, -1.5)))
    expected = Chunk(1, 4, (5,), "é", Usage(3, 5, 1), logprobs=(parsed,), prompt_logprobs=(parsed,))
    assert event_from_pb(inference_pb2.GenerateResponse(chunk=message)) == expected


@pytest.mark.parametrize(
    ("matched", "expected"), [({"matched_token_id": 0}, 0), ({"matched_stop_str": "\n"}, "\n"), ({}, None)]
)
def test_what_ended_a_completion(matched: dict[str, int | str], expected: int | str | None) -> None:
    message = inference_pb2.GenerateComplete(
        finish_reason=common_pb2.FINISH_REASON_STOP,
        **matched,  # type: ignore[arg-type]
    )
    event = event_from_pb(inference_pb2.GenerateResponse(complete=message))
    assert isinstance(event, Complete)
    assert (event.finish_reason, event.matched_stop) == (FinishReason.STOP, expected)


def test_a_kind_of_event_from_the_future_is_passed_over() -> None:
    # Field 15, two bytes long: a message that this version does not know.
    assert event_from_pb(inference_pb2.GenerateResponse.FromString(b"\x7a\x02\x08\x01")) is None


def test_completions_come_in_order_of_their_index_however_they_arrived() -> None:
    collector = EventCollector()
    for event in (STARTED, complete(1), Chunk(0, 0, (8,), "a", Usage()), complete(0)):
        collector.add(event)
    result = collector.result()
    assert [(completion.index, completion.text) for completion in result.completions] == [(0, "a"), (1, "")]


@pytest.mark.parametrize(
    "events",
    [[], [STARTED], [STARTED, complete(0), Chunk(1, 0, (8,), "a", Usage())], [complete(0)]],
    ids=["nothing", "no answer", "one answer of two unfinished", "never started"],
)
def test_a_stream_that_ends_early_is_no_result(events: list[Started | Chunk | Complete]) -> None:
    collector = EventCollector()
    for event in events:
        collector.add(event)
    with pytest.raises(InternalError):
        collector.result()
