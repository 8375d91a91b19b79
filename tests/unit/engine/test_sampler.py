import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from engine.api import EngineRequest
from engine.counter_rng import stream_key
from engine.request import Request
from engine.sampler import Sampler
from engine.torch_sampling import TorchSampling
from pdmesh.errors import InternalError
from pdmesh.sampling import SamplingParams
from pdmesh.types import TokenLogprob
from tests.unit.engine.plain_squares import plain_squares32

CPU = torch.device("cpu")
PROMPT = (1, 2)


def seated(requests: Sequence[Request], vocab_size: int) -> Sampler:
    """A sampler in which each request has the seat of its place."""
    sampler = Sampler(TorchSampling(), num_seats=len(requests), vocab_size=vocab_size, device=CPU)
    for seat, request in enumerate(requests):
        request.seat = seat
        sampler.seat(request)
    return sampler


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    seats = np.arange(len(requests))
    return [int(token_id) for token_id in seated(requests, logits.shape[1]).sample(logits, requests, seats)]


def request_after(params: SamplingParams, output: Sequence[int] = (), completion: int = 0) -> Request:
    """One that has PROMPT + output."""
    return Request(EngineRequest("r", PROMPT, params, output_token_ids=tuple(output), completion_index=completion))


def draw(logits: Sequence[float], params: SamplingParams, output: Sequence[int] = (), completion: int = 0) -> int:
    """The token that follows PROMPT + output."""
    [token_id] = sample(torch.tensor([logits], dtype=torch.float32), [request_after(params, output, completion)])
    return token_id


def draw_with_logprob(
    logits: Sequence[float], params: SamplingParams, output: Sequence[int] = ()
) -> tuple[int, TokenLogprob]:
    """The token that follows PROMPT + output, and its logprob."""
    request, row, seats = request_after(params, output), torch.tensor([logits]), np.arange(1)
    sampler = seated([request], len(logits))
    token_ids = sampler.sample(row, [request], seats)
    return int(token_ids[0]), sampler.logprobs(row, [request], seats, token_ids)[request]


def frequencies(logits: Sequence[float], params: SamplingParams, num_draws: int = 4000) -> list[float]:
    """How often each token comes, over outputs 0, 1, … of one seed."""
    requests = [request_after(params, (0,) * index) for index in range(num_draws)]
    counts = [0] * len(logits)
    for token_id in sample(torch.tensor([logits] * num_draws, dtype=torch.float32), requests):
        counts[token_id] += 1
    return [count / num_draws for count in counts]


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [weight / sum(weights) for weight in weights]


def test_greedy_takes_the_likeliest() -> None:
    assert draw([0.0, 3.0, 1.0], SamplingParams(temperature=0.0)) == 1


def test_draws_follow_the_softmax() -> None:
    logits = [0.0, 1.0, 2.0, -1.0, 0.5]
    for temperature in (1.0, 0.5, 2.0):
        drawn = frequencies(logits, SamplingParams(temperature=temperature, seed=11))
        expected = softmax([x / temperature for x in logits])
        for frequency, probability in zip(drawn, expected, strict=True):
            # Four standard deviations.
            assert abs(frequency - probability) < 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_a_draw_is_the_function_of_seed_completion_index_and_token_that_it_is_said_to_be() -> None:
    logits = [0.0, 1.0, 2.0, -1.0, 0.5]
    for seed, completion, index in ((0, 0, 0), (5, 0, 3), (5, 2, 3), (2**64 - 1, 15, 200)):
        key = stream_key(seed, completion) % 2**64
        scores = []
        for token_id, logit in enumerate(logits):
            uniform = (plain_squares32(index << 32 | token_id, key) + 0.5) / 2**32
            scores.append(logit / 0.7 - math.log(-math.log(uniform)))
        drawn = draw(logits, SamplingParams(temperature=0.7, seed=seed), output=(0,) * index, completion=completion)
        assert drawn == max(range(5), key=scores.__getitem__)


def test_rounding_noise_leaves_draws_as_they_are() -> None:
    """Also where it swaps the order of neighbours: inverting the CDF would move every draw that falls between them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(400, 1000)
    noisy = logits + 1e-6 * torch.randn(logits.shape, generator=generator)
    params = SamplingParams(temperature=1.0, seed=3)
    requests = [request_after(params, (0,) * index) for index in range(400)]
    assert sample(logits, requests) == sample(noisy, requests)


def test_a_batch_draws_what_each_of_its_rows_draws_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator) * 3
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.8, top_k=5, seed=2),
        SamplingParams(temperature=1.2, top_p=0.7, seed=3),
        SamplingParams(temperature=1.0, min_p=0.2, seed=4),
        SamplingParams(temperature=1.0, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.5, seed=5, logprobs=2),
    ]
    requests = [request_after(p) for p in params]
    sampler, seats = seated(requests, 50), np.arange(6)
    alone = [draw(row, p) for row, p in zip(logits.tolist(), params, strict=True)]
    _, alone_logprob = draw_with_logprob(logits[5].tolist(), params[5])
    together = sampler.sample(logits, requests, seats)
    assert together.tolist() == alone
    assert sampler.logprobs(logits, requests, seats, together) == {requests[5]: alone_logprob}


def test_a_seat_forgets_its_last_request() -> None:
    picky = SamplingParams(temperature=1.0, top_k=1, repetition_penalty=9.0, logit_bias={0: 9.0}, logprobs=1, seed=3)
    first, second = request_after(picky), request_after(SamplingParams(temperature=0.0))
    sampler, seats = seated([first], 3), np.arange(1)
    second.seat = 0
    sampler.seat(second)
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    token_ids = sampler.sample(logits, [second], seats)
    assert token_ids.tolist() == [1]
    assert sampler.logprobs(logits, [second], seats, token_ids) == {}


# Probabilities 0.4, 0.3, 0.2, 0.1.
LOGITS = [math.log(0.2), math.log(0.4), math.log(0.1), math.log(0.3)]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 100}, {0: 0.2, 1: 0.4, 2: 0.1, 3: 0.3}),
        ({"top_k": 1}, {1: 1.0}),
        # The smallest set that reaches top_p.
        ({"top_p": 0.65}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.75}, {0: 2 / 9, 1: 4 / 9, 3: 3 / 9}),
        ({"top_p": 1e-9}, {1: 1.0}),
        # At least min_p times the likeliest: 0.4 * 0.6 = 0.24.
        ({"min_p": 0.6}, {1: 4 / 7, 3: 3 / 7}),
        ({"min_p": 1.0}, {1: 1.0}),
        # top_p counts what top_k leaves: 4/9 and 3/9 of it reach 0.75.
        ({"top_k": 3, "top_p": 0.75}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 3, "min_p": 0.9}, {1: 1.0}),
    ],
)
def test_truncation(params: Mapping[str, float], kept: dict[int, float]) -> None:
    drawn = frequencies(LOGITS, SamplingParams(temperature=1.0, seed=8, **params))  # type: ignore[arg-type]
    for token_id, frequency in enumerate(drawn):
        assert (frequency > 0) == (token_id in kept)
        assert abs(frequency - kept.get(token_id, 0.0)) < 0.032


def test_truncation_follows_temperature() -> None:
    # At temperature 0.5 the probabilities are 16, 9, 4 and 1 thirtieths: two tokens reach 0.8.
    drawn = frequencies(LOGITS, SamplingParams(temperature=0.5, top_p=0.8, seed=8))
    assert [frequency > 0 for frequency in drawn] == [False, True, False, True]


def test_tokens_that_tie_at_the_end_are_all_kept() -> None:
    drawn = frequencies([1.0, 0.0, 0.0, -5.0], SamplingParams(temperature=1.0, top_k=2, seed=8))
    assert [frequency > 0 for frequency in drawn] == [True, True, True, False]


def test_top_p_may_reach_far_into_a_flat_distribution() -> None:
    """Further than the sampler looks at first."""
    logits = torch.linspace(0, -0.001, 4000)
    drawn = frequencies(logits.tolist(), SamplingParams(temperature=1.0, top_p=0.5, seed=8), num_draws=1000)
    reached = [token_id for token_id, frequency in enumerate(drawn) if frequency]
    assert 1950 < max(reached) < 2001


def test_tiny_and_huge_temperatures() -> None:
    assert draw([0.0, 3.0, 1.0], SamplingParams(temperature=1e-30)) == 1
    drawn = frequencies([0.0, 3.0], SamplingParams(temperature=100.0, seed=8))
    assert abs(drawn[1] - softmax([0.0, 0.03])[1]) < 0.032


# Penalties, bias, masks: by hand, with log-probabilities to look at.


def logits_after(logits: Sequence[float], params: SamplingParams, output: Sequence[int] = ()) -> list[float]:
    """What the edits leave, up to a constant: the log-probability of each token by hand of its logprobs."""
    _, logprob = draw_with_logprob(logits, params, output)
    return [dict(logprob.top)[token_id] for token_id in range(len(logits))]


def log_softmax(logits: Sequence[float]) -> list[float]:
    return [math.log(p) for p in softmax(logits)]


@pytest.mark.parametrize(
    ("params", "output", "edited"),
    [
        # Over the prompt (1, 2) and the output: positive logits are divided, negative ones multiplied.
        ({"repetition_penalty": 2.0}, (), [1.0, 1.0, -2.0, 3.0]),
        ({"repetition_penalty": 2.0}, (3, 3), [1.0, 1.0, -2.0, 1.5]),
        # Over the output alone: once for presence, each time for frequency.
        ({"presence_penalty": 0.5}, (3, 3), [1.0, 2.0, -1.0, 2.5]),
        ({"frequency_penalty": 0.5}, (3, 3, 0), [0.5, 2.0, -1.0, 2.0]),
        ({"frequency_penalty": -1.0, "presence_penalty": 1.0}, (3, 3), [1.0, 2.0, -1.0, 4.0]),
        ({"logit_bias": {0: 5.0, 3: -100.0}}, (), [6.0, 2.0, -1.0, -97.0]),
        # All together, in this order.
        (
            {"repetition_penalty": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {3: 1.0}},
            (3, 3),
            [1.0, 1.0, -2.0, 3.0 / 2 - 0.5 - 0.5 + 1.0],
        ),
    ],
)
def test_edits(params: Mapping[str, object], output: Sequence[int], edited: list[float]) -> None:
    sampling = SamplingParams(temperature=0.0, logprobs=4, max_tokens=9, **params)  # type: ignore[arg-type]
    assert logits_after([1.0, 2.0, -1.0, 3.0], sampling, output) == pytest.approx(log_softmax(edited), abs=1e-5)


def test_counts_grow_as_tokens_come() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0, presence_penalty=0.5, repetition_penalty=1.1)
    logits = [5.0, 6.0, 3.0, 5.5]
    request = request_after(params)
    sampler = seated([request], 4)
    for _ in range(8):
        [token_id] = sampler.sample(torch.tensor([logits]), [request], np.arange(1)).tolist()
        # One made anew from the tokens says the same.
        assert token_id == draw(logits, params, request.token_ids[2:])
        request.token_ids.append(token_id)
    assert len(set(request.token_ids[2:])) > 1


def test_stop_tokens_are_masked_until_min_tokens_are_out() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(1,))
    logits = [1.0, 9.0, 0.0]
    assert [draw(logits, params, (0,) * n) for n in range(4)] == [0, 0, 1, 1]


def test_logprobs_are_of_before_temperature_and_truncation() -> None:
    logits = [0.0, 1.0, 2.0]
    token_id, logprob = draw_with_logprob(logits, SamplingParams(temperature=0.3, top_k=1, logprobs=2))
    assert token_id == logprob.token_id == 2
    expected = log_softmax(logits)
    assert logprob.logprob == pytest.approx(expected[2], abs=1e-6)
    assert [token_id for token_id, _ in logprob.top] == [2, 1]
    assert [value for _, value in logprob.top] == pytest.approx([expected[2], expected[1]], abs=1e-6)


def test_logprobs_without_alternatives() -> None:
    _, logprob = draw_with_logprob([0.0, 1.0], SamplingParams(temperature=0.0, logprobs=0))
    assert logprob.top == ()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error_not_a_token(temperature: float, bad: float) -> None:
    with pytest.raises(InternalError, match="not finite"):
        draw([0.0, bad, 1.0], SamplingParams(temperature=temperature))
