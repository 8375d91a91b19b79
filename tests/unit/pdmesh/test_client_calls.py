"""Requests as clients make them of arguments."""

from typing import Any

import pytest

from pdmesh.client_calls import generate_request, tokenize_request
from pdmesh.errors import InvalidRequestError
from pdmesh.sampling import SamplingParams


def test_only_what_was_given_is_set() -> None:
    request = generate_request("hi", {"temperature": 0.0, "seed": 5})
    assert request.text == "hi"
    assert {field.name for field, _ in request.sampling_params.ListFields()} == {"temperature", "seed"}


def test_a_chat_keeps_its_turns() -> None:
    request = generate_request(
        None, {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    )
    assert [(turn.role, turn.content) for turn in request.chat.messages] == [("system", "s"), ("user", "u")]


def test_tokens_and_the_rest_arrive() -> None:
    request = generate_request(None, {"tokens": [1, 2], "model": "m", "priority": -3, "cache_salt": "t"})
    assert list(request.tokens.ids) == [1, 2]
    assert (request.model, request.priority, request.cache_salt) == ("m", -3, "t")


def test_single_parameters_come_before_those_given_at_once() -> None:
    sampling = SamplingParams(temperature=0.5, top_k=4, stop=("a", "b"))
    params = generate_request("x", {"sampling": sampling, "stop": ["c"], "temperature": 0.0}).sampling_params
    assert (params.temperature, params.top_k, list(params.stop)) == (0.0, 4, ["c"])


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (None, {}),
        ("a", {"tokens": [1]}),
        (None, {"tokens": [1], "messages": []}),
        ("a", {"top_k": -1}),
        ("a", {"temperature": "hot"}),
        ("a", {"max_tokens": 2**40}),
        (None, {"tokens": [-1]}),
        (None, {"messages": [{"role": "user"}]}),
        ("\ud800", {}),
    ],
)
def test_what_no_message_can_hold_is_refused(text: str | None, options: Any) -> None:
    with pytest.raises(InvalidRequestError):
        generate_request(text, options)


@pytest.mark.parametrize(("text", "messages"), [(None, None), ("a", [])])
def test_tokenize_takes_one_input(text: str | None, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="exactly one"):
        tokenize_request(text, messages, "")
