"""Sampling parameters: limits, defaults, and the way over the wire."""

from typing import Any

import pytest

from pdmesh.errors import InvalidRequestError
from pdmesh.sampling import SamplingParams
from pdmesh.v1 import common_pb2

VOCAB_SIZE = 100
NAN, INF = float("nan"), float("inf")

REFUSED: list[dict[str, Any]] = [
    *({"temperature": value} for value in (-0.1, 100.1, NAN, INF)),
    *({"top_p": value} for value in (0.0, -0.5, 1.01, NAN)),
    *({"top_k": value} for value in (-1, 2**31)),
    *({"min_p": value} for value in (-0.1, 1.1, NAN)),
    *({"repetition_penalty": value} for value in (0.0, -1.0, 100.5, NAN)),
    *({"presence_penalty": value} for value in (-2.1, 2.1, NAN)),
    *({"frequency_penalty": value} for value in (-2.1, 2.1, NAN)),
    *({"seed": value} for value in (-1, 2**64)),
    *({"max_tokens": value} for value in (0, 2**31)),
    {"max_tokens": 4, "min_tokens": 5},
    *({"n": value} for value in (0, 17)),
    *({"logprobs": value} for value in (-1, 21)),
    *({"prompt_logprobs": value} for value in (-1, 21)),
    *({"stop": value} for value in (("",), ("é" * 129,), ("x",) * 17)),
    *({"stop_token_ids": value} for value in ((VOCAB_SIZE,), (-1,), (0,) * 65)),
    *({"logit_bias": value} for value in ({VOCAB_SIZE: 1.0}, {1: 100.5}, {1: -101.0}, {1: NAN})),
]

ALLOWED: list[dict[str, Any]] = [
    {},
    *({"temperature": value} for value in (0.0, 100.0)),
    *({"top_p": value} for value in (1e-9, 1.0)),
    *({"min_p": value} for value in (0.0, 1.0)),
    {"seed": 2**64 - 1},
    {"max_tokens": 4, "min_tokens": 4},
    {"n": 16, "logprobs": 20, "prompt_logprobs": 0},
    {"stop": ("é" * 128,) * 16},
    {"stop_token_ids": (0, VOCAB_SIZE - 1), "logit_bias": {0: -100.0, VOCAB_SIZE - 1: 100.0}},
]


@pytest.mark.parametrize("values", REFUSED, ids=repr)
def test_beyond_a_limit(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        SamplingParams(**values).validate(VOCAB_SIZE)
    assert raised.value.reason == "INVALID_SAMPLING_PARAMS"
    assert {"field", "value", "low", "high"} == raised.value.details.keys()


@pytest.mark.parametrize("values", ALLOWED, ids=repr)
def test_at_a_limit(values: dict[str, Any]) -> None:
    SamplingParams(**values).validate(VOCAB_SIZE)


def test_nothing_set_is_every_default() -> None:
    assert SamplingParams.from_pb(common_pb2.SamplingParams()) == SamplingParams()


def test_every_field_survives_the_wire() -> None:
    params = SamplingParams(
        temperature=0.1, top_p=0.2, top_k=3, min_p=0.4, repetition_penalty=1.5, presence_penalty=0.6,
        frequency_penalty=0.7, seed=8, max_tokens=9, min_tokens=1, stop=("a",), stop_token_ids=(2,), ignore_eos=True,
        include_stop_str_in_output=True, logit_bias={3: -1.5}, logprobs=4, prompt_logprobs=5, n=6,
    )  # fmt: skip
    assert SamplingParams.from_pb(params.to_pb()) == params


def test_zero_is_not_unset() -> None:
    message = common_pb2.SamplingParams(temperature=0.0, logprobs=0, max_tokens=0)
    params = SamplingParams.from_pb(message)
    assert (params.temperature, params.logprobs, params.max_tokens) == (0.0, 0, 0)
