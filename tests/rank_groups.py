"""Requests that share beginnings, arrive while others run and crowd each other out; and what each gets alone."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.api import EngineRequest, TokenOutput
from engine.assembly import Assembly, assemble
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.loader import load_model
from engine.parallel.spawn import spawned_group
from engine.request import Request
from pdmesh.sampling import SamplingParams
from pdmesh.types import TokenLogprob

NUM_TOKENS = 24
# Of float32 logits of some tens, summed in another order.
_ROUNDING = 2e-3

_GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, logprobs=3)
_SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=NUM_TOKENS, logprobs=0)
_JUDGED = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=2)
# So few that the requests of `arrivals` take each other's, and enough for the longest of them.
FEW_BLOCKS = 18


@dataclass(frozen=True)
class Arrival:
    """A request, and the step before which it comes."""

    step: int
    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class Answer:
    """What a request got, in all."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob]


def arrivals(vocab_size: int = 320) -> list[Arrival]:
    """Prompts of one token, of less and more than a block, of more rows than one call for logits takes, and of enough
    tokens for several micro-batches; two begin as others do."""
    draw = random.Random(3)
    short, block, judged, long, other = (
        tuple(draw.randrange(vocab_size) for _ in range(length)) for length in (1, 15, 100, 190, 130)
    )
    return [
        Arrival(0, long, _GREEDY),
        Arrival(0, short, _SEEDED),
        Arrival(1, judged, _JUDGED),
        Arrival(2, other, _SEEDED),
        Arrival(4, (*long[:96], *block), _GREEDY),
        Arrival(6, block, _GREEDY),
        Arrival(30, long[:150], _SEEDED),
        Arrival(31, judged[:99], _GREEDY),
    ]


def config(model: Path, *, chunk: int = 512, num_blocks: int = FEW_BLOCKS, **fields: object) -> EngineConfig:
    values: dict[str, object] = {
        "device": "cpu",
        "dtype": "float32",
        "block_size": 16,
        "max_model_len": 240,
        "max_num_seqs": 6,
        "num_threads": 1,
    }
    values |= {"model": str(model), "max_prefill_chunk": chunk, "num_blocks": num_blocks} | fields
    return EngineConfig(**values)  # type: ignore[arg-type]


@contextmanager
def group_of_ranks(of: EngineConfig, *, tp: int = 1, pp: int = 1) -> Iterator[Assembly]:
    """An engine over tp * pp ranks, which this process leads."""
    with spawned_group(of, tp=tp, pp=pp) as group:
        yield assemble(of, load_model, lambda done, total: None, group=group)


def alone(of: EngineConfig, arriving: Sequence[Arrival]) -> list[Answer]:
    """What one rank answers to each request by itself, its prompt in one step and nothing cached."""
    core = assemble(of, load_model, lambda done, total: None).core
    return [
        serve(core, [Arrival(0, arrival.prompt, arrival.sampling)], salt=bytes([number]))[0][0]
        for number, arrival in enumerate(arriving)
    ]


def serve(core: EngineCore, arriving: Sequence[Arrival], salt: bytes = b"") -> tuple[list[Answer], list[Request]]:
    """Steps until all are answered; what they got, and how they fared."""
    requests = [
        Request(EngineRequest(f"r{number}", arrival.prompt, arrival.sampling, cache_salt=salt))
        for number, arrival in enumerate(arriving)
    ]
    outputs: dict[Request, list[TokenOutput]] = {request: [] for request in requests}
    step = 0
    while step <= max(arrival.step for arrival in arriving) or not all(request.finished for request in requests):
        for arrival, request in zip(arriving, requests, strict=True):
            if arrival.step == step:
                core.scheduler.add(request)
        for output in core.step():
            assert isinstance(output.event, TokenOutput), output.event
            outputs[output.request].append(output.event)
        core.scheduler.check_invariants()
        step += 1
    assert core.status().num_free_blocks == core.status().num_blocks
    return [_answer(outputs[request]) for request in requests], requests


def _answer(outputs: Sequence[TokenOutput]) -> Answer:
    return Answer(
        token_ids=[token for output in outputs for token in output.token_ids],
        logprobs=[logprob for output in outputs for logprob in output.logprobs],
        prompt_logprobs=[logprob for output in outputs for logprob in output.prompt_logprobs],
    )


def assert_same(actual: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """The same tokens, and logprobs up to rounding."""
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.token_ids == theirs.token_ids, f"request {number}"
        for of_ours, of_theirs in (
            (ours.logprobs, theirs.logprobs),
            (ours.prompt_logprobs, theirs.prompt_logprobs),
        ):
            assert len(of_ours) == len(of_theirs)
            for place, (one, other) in enumerate(zip(of_ours, of_theirs, strict=True)):
                where = f"request {number}, token {place}"
                assert one.token_id == other.token_id, where
                assert abs(one.logprob - other.logprob) < _ROUNDING, where
                assert [token for token, _ in one.top] == [token for token, _ in other.top], where
                for (_, top), (_, other_top) in zip(one.top, other.top, strict=True):
                    assert abs(top - other_top) < _ROUNDING, where
