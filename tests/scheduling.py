"""A scheduler stepped by hand. Tokens come from the fake model's formula; no tensors are involved."""

from engine.api import EngineRequest
from engine.outputs import StepOutput
from engine.request import Request
from engine.scheduler import Scheduler, SchedulerConfig
from engine.step import StepPlan, StepResult
from pdmesh.sampling import SamplingParams
from tests.fake_model import fake_next

CONFIG = SchedulerConfig(
    num_blocks=16, block_size=4, max_model_len=32, max_num_seqs=4, max_num_batched_tokens=16, max_prefill_chunk=8
)


def request(
    num_tokens: int,
    *,
    max_tokens: int = 4,
    priority: int = 0,
    hold: bool = False,
    first: int = 0,
    output: tuple[int, ...] = (),
    prompt_logprobs: int | None = None,
) -> Request:
    """A request whose prompt is first, first + 1, …"""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    prompt = tuple(range(first, first + num_tokens))
    return Request(EngineRequest("r", prompt, sampling, priority=priority, output_token_ids=output), hold_blocks=hold)


def run(scheduler: Scheduler, plan: StepPlan) -> list[StepOutput]:
    """Runs and takes in a plan, and checks that everything still agrees."""
    sampling = [*plan.decodes, *(chunk.request for chunk in plan.prefills if chunk.samples)]
    judged = [chunk.request for chunk in plan.prefills if chunk.request.prompt_logprobs is not None]
    result = StepResult([fake_next(r.token_ids) for r in sampling], prompt_logprobs={r: [] for r in judged})
    outputs = list(scheduler.update(plan, result))
    scheduler.check_invariants()
    return outputs


def scheduled(plan: StepPlan) -> list[tuple[Request, int]]:
    """How many tokens the plan computes of whom."""
    return [(r, 1) for r in plan.decodes] + [(chunk.request, chunk.num_tokens) for chunk in plan.prefills]


def step(scheduler: Scheduler) -> list[tuple[Request, int]]:
    """One whole step; returns how many tokens it computed of whom."""
    plan = scheduler.schedule()
    run(scheduler, plan)
    return scheduled(plan)


def drain(scheduler: Scheduler) -> None:
    """Steps until nothing is left."""
    for _ in range(1000):
        if not step(scheduler):
            return
    raise AssertionError("it does not end")


def assert_whole(scheduler: Scheduler) -> None:
    scheduler.check_invariants()
    status = scheduler.status(0)
    assert (status.num_requests, status.num_leases) == (0, 0)
    assert status.num_free_blocks == status.num_blocks
    assert scheduler.load().num_queued_tokens == 0
