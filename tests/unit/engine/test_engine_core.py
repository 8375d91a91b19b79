"""Random traffic through scheduler, runner and a KV cache: every token is the right one, and nothing is left behind."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, cycle

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api import BlockLease, EngineRequest, ImportedPrompt, PrefillUpdate, TokenOutput
from engine.core import EngineCore
from engine.executor import OneProcess, TorchExecutor
from engine.kv_cache import KVCache
from engine.leases import Reservation
from engine.outputs import StepOutput
from engine.request import Request
from engine.runner import ModelRunner
from engine.scheduler import Scheduler, SchedulerConfig
from pdmesh.errors import InternalError
from pdmesh.sampling import SamplingParams
from tests.fake_model import FAKE_CONFIG, FakeModel, fake_next, fake_output

CPU = torch.device("cpu")


class Harness:
    """A core around a fake model, stepped by hand; its KV cache begins as NaN.

    Args:
        durations_s: What steps take, over and over.
    """

    def __init__(
        self, config: SchedulerConfig, model: FakeModel | None = None, durations_s: Sequence[float] = (0.01,)
    ) -> None:
        self.scheduler = Scheduler(config)
        self.cache = KVCache(
            FAKE_CONFIG, num_blocks=config.num_blocks, block_size=config.block_size, dtype=torch.float32, device=CPU
        )
        self.cache.data.fill_(torch.nan)
        runner = ModelRunner(
            OneProcess(TorchExecutor(model or FakeModel(), self.cache)),
            device=CPU,
            block_size=config.block_size,
            vocab_size=FAKE_CONFIG.vocab_size,
            num_seats=config.max_num_seqs,
            max_blocks=config.max_request_blocks,
        )
        # Read before and after each step.
        ticks = accumulate(chain.from_iterable((1.0, duration_s) for duration_s in cycle(durations_s)))
        self.core = EngineCore(self.scheduler, runner, clock=lambda: next(ticks))

    def step(self) -> list[StepOutput]:
        outputs = self.core.step()
        self.scheduler.check_invariants()
        return outputs

    def write_prompt(self, block_ids: list[int], token_ids: tuple[int, ...], first_block: int) -> None:
        """Writes KV as a transfer from another worker would."""
        size = self.cache.block_size
        for index in range(first_block * size, len(token_ids)):
            self.cache.data[block_ids[index // size], 0, 0, 0, index % size, 0] = token_ids[index]

    def kv_of(self, block_ids: tuple[int, ...], num_tokens: int) -> list[int]:
        """The tokens whose KV lies in these blocks."""
        values = self.cache.data[list(block_ids), 0, 0, 0, :, 0].flatten()[:num_tokens]
        return [int(value) for value in values]

    def assert_whole(self) -> None:
        self.scheduler.check_invariants()
        status = self.core.status()
        assert (status.num_requests, status.num_leases) == (0, 0)
        assert status.num_free_blocks == status.num_blocks


@dataclass
class Arrival:
    """What a generated request does, and when.

    Attributes:
        kind: "generate", "prefill" or "import".
        at: Step before which it comes.
        leaves_after: Steps after which it is cancelled or released; None: when it is over.
    """

    kind: str
    at: int
    prompt: tuple[int, ...]
    max_tokens: int
    priority: int
    seed: int | None
    leaves_after: int | None
    prompt_logprobs: bool
    tokens: list[int] = field(default_factory=list)
    over: bool = False
    left: bool = False

    def request(self) -> Request:
        sampling = SamplingParams(
            temperature=0.0 if self.seed is None else 0.9,
            seed=self.seed or 0,
            max_tokens=self.max_tokens,
            prompt_logprobs=2 if self.prompt_logprobs else None,
            frequency_penalty=0.1 if self.seed else 0.0,
        )
        source = EngineRequest("r", self.prompt, sampling, priority=self.priority)
        return Request(source, hold_blocks=self.kind == "prefill")


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    # Few distinct prompts, so that prefixes are shared often.
    prompt = tuple(range(draw(st.sampled_from([0, 0, 50])), 97))[: draw(st.integers(1, 24))]
    return Arrival(
        kind=draw(st.sampled_from(["generate", "generate", "prefill", "import"])),
        at=draw(st.integers(0, 12)),
        prompt=prompt,
        max_tokens=draw(st.integers(1, 10)),
        priority=draw(st.integers(-1, 1)),
        seed=draw(st.none() | st.integers(0, 3)),
        leaves_after=draw(st.none() | st.none() | st.integers(0, 8)),
        prompt_logprobs=draw(st.booleans() if draw(st.booleans()) else st.just(False)),
    )


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    block_size = draw(st.sampled_from([1, 2, 4]))
    longest = -(-35 // block_size)
    max_num_seqs = draw(st.integers(1, 5))
    return SchedulerConfig(
        num_blocks=longest + draw(st.integers(0, longest)),
        block_size=block_size,
        max_model_len=35,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 12)),
        max_prefill_chunk=draw(st.integers(1, 12)),
        num_full_rate_tokens=draw(st.integers(1, 12)),
        max_mixed_slowdown=draw(st.floats(1.0, 4.0)),
        max_prefill_wait_s=draw(st.floats(0.0, 1.0)),
    )


ROOMY = SchedulerConfig(
    num_blocks=64, block_size=4, max_model_len=64, max_num_seqs=1, max_num_batched_tokens=64, max_prefill_chunk=64
)


def alone(arrival: Arrival) -> list[int]:
    """The tokens of a request that has an engine to itself."""
    if arrival.seed is None:
        return fake_output(arrival.prompt, arrival.max_tokens)
    harness = Harness(ROOMY)
    request = Request(arrival.request().source)
    harness.scheduler.add(request)
    while not request.finished:
        harness.step()
    return request.token_ids[len(arrival.prompt) :]


class Traffic:
    """Plays arrivals on a harness and takes down what each is told."""

    def __init__(self, harness: Harness, plays: list[Arrival]) -> None:
        self.harness = harness
        self.plays = plays
        self.requests: dict[Request, Arrival] = {}
        self.leases: dict[Reservation, Arrival] = {}
        self.due_to_leave: list[tuple[int, Request | Reservation]] = []

    def run(self) -> None:
        for now in range(2000):
            for arrival in self.plays:
                if arrival.at == now:
                    self.arrive(arrival, now)
            for when, who in self.due_to_leave:
                if when == now:
                    self.leave(who)
            self.import_granted()
            for output in self.harness.step():
                self.hear(output)
            if now > 12 and all(arrival.over or arrival.left for arrival in self.plays):
                return
        raise AssertionError(f"not over after 2000 steps: {[a for a in self.plays if not a.over]}")

    def arrive(self, arrival: Arrival, now: int) -> None:
        who: Request | Reservation
        if arrival.kind == "import":
            lease = BlockLease()
            self.harness.scheduler.acquire_prefix(lease, arrival.prompt, b"")
            num_blocks = self.harness.scheduler.config.num_blocks_of(len(arrival.prompt)) - len(lease.block_ids)
            who = Reservation(lease, num_blocks)
            self.harness.scheduler.reserve(who)
            self.leases[who] = arrival
        else:
            who = arrival.request()
            self.harness.scheduler.add(who)
            self.requests[who] = arrival
        if arrival.leaves_after is not None:
            self.due_to_leave.append((now + arrival.leaves_after, who))

    def leave(self, who: Request | Reservation) -> None:
        if isinstance(who, Reservation):
            if who in self.leases:
                self.harness.scheduler.cancel_reservation(who)
                self.harness.scheduler.release(who.lease)
                self.leases.pop(who).left = True
        else:
            self.harness.scheduler.abort(who)
            self.requests[who].left = True

    def import_granted(self) -> None:
        for reservation in [r for r in self.leases if r.granted]:
            arrival = self.leases.pop(reservation)
            lease = reservation.lease
            self.harness.write_prompt(lease.block_ids, arrival.prompt, lease.num_cached_blocks)
            request = arrival.request()
            arrival.tokens.append(alone(arrival)[0])
            self.requests[request] = arrival
            self.harness.scheduler.add_imported(request, ImportedPrompt(lease, arrival.tokens[0]))

    def hear(self, output: StepOutput) -> None:
        arrival = self.requests[output.request]
        assert not arrival.over
        event = output.event
        if isinstance(event, PrefillUpdate):
            computed = event.num_computed_tokens
            assert self.harness.kv_of(event.block_ids, computed) == list(arrival.prompt[:computed])
            event = event.output or TokenOutput(0, ())
        assert isinstance(event, TokenOutput)
        assert event.first_token_index == len(arrival.tokens)
        arrival.tokens += event.token_ids
        arrival.over = output.last
        if event.token_ids and event.first_token_index == 0 and arrival.prompt_logprobs:
            assert [logprob.token_id for logprob in event.prompt_logprobs] == list(arrival.prompt[1:])
            likeliest = [fake_next(arrival.prompt[:end]) for end in range(1, len(arrival.prompt))]
            assert [logprob.top[0][0] for logprob in event.prompt_logprobs] == likeliest
        if output.last and arrival.kind == "prefill":
            assert arrival.tokens == alone(arrival)[:1]
            if arrival.leaves_after is None:
                self.harness.scheduler.abort(output.request)
        elif output.last:
            assert event.finish_reason is not None
            assert arrival.tokens == alone(arrival)


@settings(max_examples=150, deadline=None)
@given(
    config=configs(),
    plays=st.lists(arrivals(), min_size=1, max_size=8),
    durations_s=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5),
)
def test_every_request_gets_the_tokens_that_it_gets_alone(
    config: SchedulerConfig, plays: list[Arrival], durations_s: list[float]
) -> None:
    harness = Harness(config, durations_s=durations_s)
    traffic = Traffic(harness, plays)
    traffic.run()
    for request in traffic.requests:
        harness.scheduler.abort(request)
    harness.assert_whole()


def test_prompt_logprobs_of_a_prompt_that_was_preempted_come_once() -> None:
    harness = Harness(replace(ROOMY, num_blocks=8, max_model_len=32, max_num_seqs=2, max_prefill_chunk=2))
    older = Arrival("generate", 0, (1, 2, 3, 4), 14, 0, None, None, False)
    judged = Arrival("generate", 0, tuple(range(40, 64)), 1, 0, None, None, True)
    harness.scheduler.add(older.request())
    for _ in range(3):
        harness.step()
    request = judged.request()
    harness.scheduler.add(request)
    outputs = []
    while not request.finished:
        outputs += [output.event for output in harness.step() if output.request is request]
    assert request.num_preemptions == 1
    [output] = outputs
    assert isinstance(output, TokenOutput)
    assert [logprob.token_id for logprob in output.prompt_logprobs] == list(judged.prompt[1:])


def test_a_failing_step_ends_its_requests_with_an_error_and_the_next_ones_run() -> None:
    failing = True

    def fail() -> None:
        if failing:
            raise RuntimeError("out of order")

    harness = Harness(ROOMY, FakeModel(on_forward=fail))
    arrival = Arrival("generate", 0, (1, 2, 3), 2, 0, None, None, False)
    harness.scheduler.add(arrival.request())
    [output] = harness.step()
    assert isinstance(output.event, InternalError)
    assert "RuntimeError: out of order" in output.event.message
    assert output.last
    harness.assert_whole()
    failing = False
    request = arrival.request()
    harness.scheduler.add(request)
    harness.step()
    harness.step()
    assert request.token_ids[3:] == fake_output((1, 2, 3), 2)
    harness.assert_whole()
