"""The messages of one step: scheduler ─StepPlan▶ runner ─StepResult▶ scheduler ─StepOutputs▶ streams.

A step's decodes are one tuple of requests, the same object for as long as the same requests decode: whoever keeps
something for each of them makes it anew only when they change.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.leases import Reservation
from engine.outputs import StepOutput
from engine.request import Request
from pdmesh.types import TokenLogprob


class PrefillChunk(NamedTuple):
    """A prompt's part in a step: its next `num_tokens` tokens are computed.

    Attributes:
        samples: These are the last tokens known, so the next one is sampled.
    """

    request: Request
    num_tokens: int
    samples: bool


@dataclass(slots=True)
class StepPlan:
    """What the next step computes.

    Attributes:
        decodes: Each computes its last token and samples the next one.
        prefills: Chunks of prompts; they come after the decodes.
        seated: Requests of this step that got their seats since the last one.
        grown: Decodes whose block table got one more block.
        outputs: Due before the step runs.
        granted: Reservations that have their blocks now.
    """

    decodes: tuple[Request, ...] = ()
    prefills: list[PrefillChunk] = field(default_factory=list)
    seated: list[Request] = field(default_factory=list)
    grown: list[Request] = field(default_factory=list)
    outputs: list[StepOutput] = field(default_factory=list)
    granted: list[Reservation] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to run."""
        return not (self.decodes or self.prefills)

    @property
    def requests(self) -> list[Request]:
        """Whoever takes part."""
        return [*self.decodes, *(chunk.request for chunk in self.prefills)]

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.prefills)


class PrefillBudget:
    """The prompt tokens that one step may compute, while its plan is made; thrown away after.

    Args:
        num_tokens: Most tokens in all.
        max_chunk: Most tokens of one request.
        num_full_rate_tokens: With so many the step computes at the machine's full rate: no further prompt joins, for
            it would only keep the others waiting. And the last chunk of a prompt whose KV travels is no larger: the
            first token is there, and somebody waits for the rest of the KV.
    """

    def __init__(self, plan: StepPlan, num_tokens: int, max_chunk: int, num_full_rate_tokens: int) -> None:
        self.plan = plan
        self._num_tokens = num_tokens
        self._max_chunk = max_chunk
        self._num_full_rate_tokens = num_full_rate_tokens
        self._num_planned = 0

    @property
    def open(self) -> bool:
        """Whether one more prompt may join."""
        return self._num_planned < min(self._num_tokens, self._num_full_rate_tokens)

    def add(self, request: Request) -> None:
        """Plans as many of the request's tokens as fit. The budget must be open, and at least one token missing."""
        num_missing = request.num_tokens - request.num_computed_tokens
        num_tokens = min(num_missing, self._max_chunk, self._num_tokens - self._num_planned)
        assert num_tokens > 0, "nothing left to plan with"
        if request.hold_blocks and num_tokens == num_missing >= 2 * self._num_full_rate_tokens:
            num_tokens -= self._num_full_rate_tokens
        self._num_planned += num_tokens
        self.plan.prefills.append(PrefillChunk(request, num_tokens, num_tokens == num_missing))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner made of a plan.

    Attributes:
        token_ids: The token sampled for each decode, then for each chunk that samples, in order.
        logprobs: Of the sampled tokens, for requests that want them.
        prompt_logprobs: For requests that want them: those of the prompt tokens after this step's ones.
    """

    token_ids: list[int]
    logprobs: dict[Request, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: dict[Request, list[TokenLogprob]] = field(default_factory=dict)
