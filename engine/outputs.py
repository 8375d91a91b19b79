"""What requests are told after a step.

The engine's thread only notes who got which token; the public values are made by whoever takes them, on another
thread, while the next step computes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.api import PrefillUpdate, TokenOutput
from engine.request import Request, Stop
from pdmesh.errors import MeshError
from pdmesh.types import TokenLogprob

# A request, the index of its new token in its output, that token, and why it ends with it, if it does. A plain tuple:
# it costs a tenth of a named one, and there is one for each request in each step.
NewToken = tuple[Request, int, int, Stop | None]


class StepOutput(NamedTuple):
    """What one request is told. `last` ends its stream."""

    request: Request
    event: TokenOutput | PrefillUpdate | MeshError
    last: bool


@dataclass(slots=True)
class StepOutputs:
    """What a step made, one output for each request that has any; iterate it once, on any thread.

    Attributes:
        tokens: Requests that generate.
        logprobs: Of their tokens, where asked for.
        prompt_logprobs: Likewise, with the first token.
        events: All else: progress of prompts, errors.
    """

    tokens: list[NewToken] = field(default_factory=list)
    logprobs: dict[Request, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: dict[Request, list[TokenLogprob]] = field(default_factory=dict)
    events: list[StepOutput] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens) + len(self.events)

    def __iter__(self) -> Iterator[StepOutput]:
        for token in self.tokens:
            yield StepOutput(token[0], self.token_output(token), last=token[3] is not None)
        yield from self.events

    def token_output(self, token: NewToken) -> TokenOutput:
        request, index, token_id, stop = token
        logprob = self.logprobs.get(request)
        return TokenOutput(
            first_token_index=index,
            token_ids=(token_id,),
            logprobs=() if logprob is None else (logprob,),
            prompt_logprobs=tuple(self.prompt_logprobs.get(request, ())),
            num_cached_tokens=_num_cached_prompt_tokens(request),
            finish_reason=stop.reason if stop else None,
            matched_token_id=stop.matched_token_id if stop else None,
        )


def progress(request: Request, block_size: int, output: TokenOutput | None = None) -> PrefillUpdate:
    """How far a request's prompt is; with its first token once that is there."""
    num_blocks = -(-request.num_computed_tokens // block_size)
    return PrefillUpdate(
        num_cached_tokens=request.num_cached_tokens or 0,
        num_computed_tokens=request.num_computed_tokens,
        block_ids=tuple(request.block_table[:num_blocks]),
        block_hashes=tuple(request.block_hashes[: request.num_computed_tokens // block_size]),
        output=output,
    )


def nothing_to_generate(request: Request, stop: Stop) -> StepOutput:
    """The answer to a request that its earlier output ends already."""
    output = TokenOutput(
        first_token_index=request.num_output_tokens,
        token_ids=(),
        num_cached_tokens=_num_cached_prompt_tokens(request),
        finish_reason=stop.reason,
        matched_token_id=stop.matched_token_id,
    )
    event = PrefillUpdate(0, 0, (), (), output) if request.hold_blocks else output
    return StepOutput(request, event, last=True)


def _num_cached_prompt_tokens(request: Request) -> int:
    return min(request.num_cached_tokens or 0, request.num_prompt_tokens)
