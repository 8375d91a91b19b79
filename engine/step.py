"""The messages of one step: scheduler ─StepPlan▶ runner ─StepResult▶ scheduler ─StepOutput▶ streams.

What is made for each request in each step is a named tuple: it costs a third of a frozen dataclass.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.api import PrefillUpdate, TokenOutput
from engine.leases import Reservation
from engine.request import Request
from pdmesh.errors import MeshError
from pdmesh.types import TokenLogprob


class StepOutput(NamedTuple):
    """What one request is told. `last` ends its stream."""

    request: Request
    event: TokenOutput | PrefillUpdate | MeshError
    last: bool


class ScheduledRequest(NamedTuple):
    """A request's part in a step: its next `num_tokens` tokens are computed.

    Attributes:
        num_new_blocks: Blocks at the end of its block table that no plan told of before.
        fresh: It got its seat since the last plan that had it.
        samples: These are the last tokens known, so the next one is sampled.
    """

    request: Request
    num_tokens: int
    num_new_blocks: int
    fresh: bool
    samples: bool


@dataclass(slots=True)
class StepPlan:
    """What the next step computes.

    Attributes:
        scheduled: Decoding requests first.
        outputs: Due before the step runs.
        granted: Reservations that have their blocks now.
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    outputs: list[StepOutput] = field(default_factory=list)
    granted: list[Reservation] = field(default_factory=list)


class StepBudget:
    """What is left of one step while its plan is made; thrown away after."""

    def __init__(self, num_tokens: int, max_prefill_chunk: int) -> None:
        self.plan = StepPlan()
        self.num_tokens = num_tokens
        self._max_prefill_chunk = max_prefill_chunk

    def add(self, request: Request) -> None:
        """Plans as many of the request's tokens as fit; at least one token must be left."""
        num_missing = request.num_tokens - request.num_computed_tokens
        num_tokens = min(num_missing, self._max_prefill_chunk, self.num_tokens)
        assert num_tokens > 0, "nothing left to plan with"
        self.num_tokens -= num_tokens
        num_told = request.num_planned_blocks
        num_held = request.num_planned_blocks = len(request.block_table)
        item = ScheduledRequest(request, num_tokens, num_held - num_told, num_told == 0, num_tokens == num_missing)
        self.plan.scheduled.append(item)


class SampledToken(NamedTuple):
    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner made of a plan.

    Attributes:
        sampled: For each scheduled request that samples, in order.
        prompt_logprobs: For requests that want them: those of the prompt tokens after this step's ones.
    """

    sampled: list[SampledToken]
    prompt_logprobs: dict[Request, list[TokenLogprob]] = field(default_factory=dict)
