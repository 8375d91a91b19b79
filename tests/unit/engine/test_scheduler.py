"""The scheduler, stepped by hand: prompts, decodes, prefixes, preemption."""

from dataclasses import replace

import pytest

from engine.api import EngineRequest, PrefillUpdate, TokenOutput
from engine.outputs import StepOutput
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler, SchedulerConfig
from engine.step import PrefillChunk
from pdmesh.errors import InternalError
from pdmesh.hashing import block_hashes, root_hash
from pdmesh.sampling import SamplingParams
from pdmesh.types import FinishReason
from tests.fake_model import fake_next, fake_output
from tests.scheduling import CONFIG, assert_whole, drain, request, run, scheduled, step

# Whole prompts fit into a step, and what is queued should be computed within a second.
LARGE = SchedulerConfig(
    num_blocks=100,
    block_size=16,
    max_model_len=1600,
    max_num_seqs=4,
    max_num_batched_tokens=512,
    max_prefill_chunk=512,
    max_prefill_wait_s=1.0,
)


def test_one_request_from_prompt_to_end() -> None:
    scheduler = Scheduler(CONFIG)
    a = request(10, max_tokens=2)
    scheduler.add(a)
    assert scheduler.load().num_waiting == 1
    assert scheduler.load().num_queued_tokens == 10

    # Step 1: a chunk of the prompt; blocks for all of it are there.
    plan = scheduler.schedule()
    assert plan.prefills == [PrefillChunk(a, 8, samples=False)]
    assert plan.seated == [a]
    assert len(a.block_table) == 3
    assert run(scheduler, plan) == []
    assert scheduler.load().num_queued_tokens == 2

    # Step 2: the rest, and the first token.
    plan = scheduler.schedule()
    assert plan.prefills == [PrefillChunk(a, 2, samples=True)]
    assert plan.seated == []
    [output] = run(scheduler, plan)
    first, second = fake_output(range(10), 2)
    assert output == StepOutput(a, TokenOutput(first_token_index=0, token_ids=(first,)), last=False)
    assert scheduler.load().num_queued_tokens == 0

    # Step 3: the second token is the last one.
    [output] = run(scheduler, scheduler.schedule())
    expected = TokenOutput(first_token_index=1, token_ids=(second,), finish_reason=FinishReason.LENGTH)
    assert output == StepOutput(a, expected, last=True)
    assert a.finished
    assert_whole(scheduler)
    assert scheduler.schedule().empty


def test_decodes_come_before_prefill_chunks_and_share_the_budget() -> None:
    scheduler = Scheduler(CONFIG)
    a, b, c = request(3, first=0), request(12, first=20), request(12, first=40)
    scheduler.add(a)
    assert step(scheduler) == [(a, 3)]
    scheduler.add(b)
    scheduler.add(c)
    assert step(scheduler) == [(a, 1), (b, 8), (c, 7)]
    assert step(scheduler) == [(a, 1), (b, 4), (c, 5)]
    assert step(scheduler) == [(a, 1), (b, 1), (c, 1)]


def test_one_prompt_after_the_other_where_a_step_is_full_enough() -> None:
    scheduler = Scheduler(replace(CONFIG, num_full_rate_tokens=6))
    short, shorter, long, last = request(4), request(3, first=20), request(12, first=40), request(2, first=60)
    for r in (short, shorter, long, last):
        scheduler.add(r)
    # Four tokens leave the step half empty, so a second prompt joins; seven do not.
    assert step(scheduler) == [(short, 4), (shorter, 3)]
    # A chunk is as long as ever, and what it leaves of the step is not for others.
    assert step(scheduler) == [(short, 1), (shorter, 1), (long, 8)]
    assert step(scheduler) == [(short, 1), (shorter, 1), (long, 4), (last, 2)]


def test_prompts_slow_decodes_down_only_so_far() -> None:
    scheduler = Scheduler(replace(LARGE, max_mixed_slowdown=2.0))
    decoding, prompt = request(10, max_tokens=100), request(200, first=100)
    scheduler.add(decoding)
    assert step(scheduler) == [(decoding, 10)]
    # A step of n tokens takes 9 + n ms. Beside a decode, which takes 10, prompts get 10 more: 10 tokens, or the least.
    scheduler.record_duration(10, 0.019)
    scheduler.record_duration(1, 0.010)
    scheduler.add(prompt)
    assert step(scheduler) == [(decoding, 1), (prompt, 16)]
    # Once tokens turn out to cost next to nothing, it gets all that it lacks.
    for _ in range(100):
        scheduler.record_duration(17, 0.0104)
        scheduler.record_duration(1, 0.0100)
    [decode, (_, num_tokens)] = step(scheduler)
    assert decode == (decoding, 1)
    assert num_tokens == 184
    # Without decodes a prompt has the step for itself.
    scheduler.abort(decoding)
    alone = request(300, first=400)
    scheduler.add(alone)
    scheduler.abort(prompt)
    assert step(scheduler) == [(alone, 300)]


def test_a_long_queue_slows_decodes_down_more() -> None:
    scheduler = Scheduler(LARGE)
    decoding, prompt = request(10, max_tokens=100), request(600, first=100)
    scheduler.add(decoding)
    step(scheduler)
    scheduler.record_duration(10, 0.019)
    scheduler.record_duration(1, 0.010)
    scheduler.add(prompt)
    # Of a second, 600 tokens of 1 ms leave time for 40 decodes of 10 ms: with the least share it is done in 38.
    assert step(scheduler) == [(decoding, 1), (prompt, 16)]
    # Now more are queued than can be computed in a second: decodes wait three times as long.
    scheduler.add(request(600, first=1000))
    assert step(scheduler) == [(decoding, 1), (prompt, 20)]


def test_no_more_run_than_there_are_seats() -> None:
    scheduler = Scheduler(CONFIG)
    requests = [request(2, first=10 * i) for i in range(6)]
    for r in requests:
        scheduler.add(r)
    assert [r for r, _ in step(scheduler)] == requests[:4]
    assert (scheduler.load().num_running, scheduler.load().num_waiting) == (4, 2)
    drain(scheduler)
    assert all(r.status is RequestStatus.FINISHED for r in requests)
    assert_whole(scheduler)


def test_higher_priority_waits_less_then_earlier_arrival() -> None:
    scheduler = Scheduler(replace(CONFIG, max_num_seqs=1))
    low, first, second, high = request(2), request(2), request(2, first=9), request(2, priority=5)
    low.source = replace(low.source, priority=-1)
    for r in (low, first, second, high):
        scheduler.add(r)
    served = []
    while ran := step(scheduler):
        served += [r for r, _ in ran if r not in served]
    assert served == [high, first, second, low]


def test_prefix_is_reused_but_one_token_is_always_computed() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request(8))
    drain(scheduler)
    # The same 8 tokens: the second block must be computed again for the sake of its last token.
    again, longer = request(8), request(9)
    scheduler.add(again)
    assert step(scheduler) == [(again, 4)]
    drain(scheduler)
    scheduler.add(longer)
    plan = scheduler.schedule()
    assert scheduled(plan) == [(longer, 1)]
    [output] = run(scheduler, plan)
    assert isinstance(output.event, TokenOutput)
    assert output.event.num_cached_tokens == 8


def test_output_is_cached_as_prompt_is() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request(6, max_tokens=8))
    drain(scheduler)
    prompt = [*range(6), *fake_output(range(6), 8)]
    turn = Request(EngineRequest("r", (*prompt, 90), SamplingParams(temperature=0.0, max_tokens=1)))
    scheduler.add(turn)
    # 13 of the 14 tokens were computed: three full blocks.
    assert step(scheduler) == [(turn, 15 - 12)]


def test_another_salt_shares_nothing() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request(9))
    drain(scheduler)
    other = Request(EngineRequest("r", tuple(range(9)), SamplingParams(), cache_salt=b"other"))
    scheduler.add(other)
    assert step(scheduler) == [(other, 8)]


def test_prompt_logprobs_need_every_token_computed() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request(9))
    drain(scheduler)
    judged = request(9, prompt_logprobs=0)
    scheduler.add(judged)
    assert step(scheduler) == [(judged, 8)]
    drain(scheduler)
    assert_whole(scheduler)


def test_completions_of_one_prompt_that_come_together_compute_it_once() -> None:
    scheduler = Scheduler(CONFIG)
    completions = [request(13) for _ in range(3)]
    for r in completions:
        scheduler.add(r)
    assert step(scheduler) == [(completions[0], 8)]
    assert scheduler.load().num_waiting == 2
    # They wait for the block that is computed now, too.
    assert step(scheduler) == [(completions[0], 5)]
    # Each shares three blocks and computes the token after them.
    assert step(scheduler) == [(completions[0], 1), (completions[1], 1), (completions[2], 1)]
    assert completions[1].block_table[:3] == completions[0].block_table[:3]
    drain(scheduler)
    assert_whole(scheduler)


@pytest.mark.parametrize("how", ["abort", "fail"])
def test_those_who_wait_for_a_prefix_go_on_when_its_request_is_gone(how: str) -> None:
    scheduler = Scheduler(CONFIG)
    first, second = request(13), request(13)
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert plan.requests == [first]
    if how == "abort":
        run(scheduler, plan)
        scheduler.abort(first)
        assert step(scheduler) == [(second, 5)]
    else:
        scheduler.fail(plan, InternalError("the step failed"))
        assert step(scheduler) == [(second, 8)]
    drain(scheduler)
    assert_whole(scheduler)


def test_who_waits_for_a_prefix_can_leave() -> None:
    scheduler = Scheduler(CONFIG)
    first, second = request(13), request(13)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    scheduler.abort(second)
    drain(scheduler)
    assert_whole(scheduler)


def test_the_last_in_order_is_preempted_keeps_its_output_and_recomputes() -> None:
    scheduler = Scheduler(replace(CONFIG, num_blocks=6, max_model_len=24))
    old, young = request(10, max_tokens=8), request(10, max_tokens=8, first=40)
    scheduler.add(old)
    scheduler.add(young)
    # Each has 3 blocks, which hold 12 tokens.
    while not young.num_preemptions:
        step(scheduler)
    assert young.status is RequestStatus.WAITING
    assert young.num_output_tokens == old.num_output_tokens - 1 == 3
    assert young.block_table == []
    assert scheduler.load().num_queued_tokens == 13
    drain(scheduler)
    assert old.num_preemptions == 0
    assert old.token_ids == [*range(10), *fake_output(range(10), 8)]
    assert young.token_ids == [*range(40, 50), *fake_output(range(40, 50), 8)]
    assert_whole(scheduler)


def test_lower_priority_is_preempted_before_later_arrival() -> None:
    scheduler = Scheduler(replace(CONFIG, num_blocks=6, max_model_len=24))
    early_but_low = request(10, max_tokens=8, priority=-1)
    late = request(10, max_tokens=8, first=40)
    scheduler.add(early_but_low)
    scheduler.add(late)
    drain(scheduler)
    assert early_but_low.num_preemptions > 0
    assert late.num_preemptions == 0


def test_the_last_chunk_of_a_prompt_that_travels_is_small() -> None:
    config = replace(CONFIG, max_prefill_chunk=12, max_num_batched_tokens=16, num_full_rate_tokens=4)

    def chunks(request: Request) -> list[int]:
        scheduler = Scheduler(config)
        scheduler.add(request)
        sizes = []
        while not (plan := scheduler.schedule()).empty and plan.prefills:
            sizes += [chunk.num_tokens for chunk in plan.prefills]
            run(scheduler, plan)
        return sizes

    assert chunks(request(20, hold=True)) == [12, 4, 4], "its KV is what is waited for once the first token is there"
    assert chunks(request(11, hold=True)) == [7, 4]
    assert chunks(request(7, hold=True)) == [7], "too short to be worth a step more"
    assert chunks(request(20)) == [12, 8], "its KV goes nowhere"


def test_held_request_tells_progress_and_keeps_its_blocks_until_released() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request(5))
    drain(scheduler)
    held = request(14, hold=True)
    scheduler.add(held)

    # Before its first step: what the cache had.
    plan = scheduler.schedule()
    blocks = tuple(held.block_table)
    hashes = tuple(block_hashes(range(14), 4, root_hash()))
    assert plan.outputs == [StepOutput(held, PrefillUpdate(4, 4, blocks[:1], hashes[:1]), last=False)]
    # After each step: what was computed.
    assert run(scheduler, plan) == [StepOutput(held, PrefillUpdate(4, 12, blocks[:3], hashes), last=False)]
    # After the last step: the token.
    [output] = run(scheduler, scheduler.schedule())
    token = TokenOutput(0, (fake_next(range(14)),), num_cached_tokens=4)
    assert output == StepOutput(held, PrefillUpdate(4, 14, blocks, hashes, token), last=True)

    assert scheduler.schedule().empty
    assert scheduler.status(0).num_free_blocks == 16 - 4
    assert scheduler.load().num_running == 0
    scheduler.abort(held)
    scheduler.abort(held)
    assert_whole(scheduler)


def test_a_prefill_is_never_preempted() -> None:
    scheduler = Scheduler(replace(CONFIG, num_blocks=6, max_model_len=24, max_prefill_chunk=2))
    decoding, held = request(4, max_tokens=12), request(16, hold=True, first=40)
    scheduler.add(decoding)
    step(scheduler)
    step(scheduler)
    scheduler.add(held)
    step(scheduler)
    blocks = list(held.block_table)
    assert len(blocks) == 4
    # The older one has the other two. When it needs a third, its own blocks are freed, though the prefill came later.
    while not decoding.num_preemptions:
        step(scheduler)
    assert scheduler.load().num_running == 1
    for _ in range(20):
        step(scheduler)
    assert held.status is RequestStatus.HELD
    assert held.block_table == blocks
    # What a held request has is not taken either.
    assert decoding.status is RequestStatus.WAITING
    scheduler.abort(held)
    drain(scheduler)
    assert decoding.token_ids == [*range(4), *fake_output(range(4), 12)]
    assert_whole(scheduler)


def test_a_failed_step_ends_its_requests_and_no_other() -> None:
    scheduler = Scheduler(replace(CONFIG, max_num_seqs=2))
    a, held, waiting = request(4), request(12, hold=True, first=20), request(4, first=40)
    for r in (a, held, waiting):
        scheduler.add(r)
    error = InternalError("the step failed")
    outputs = scheduler.fail(scheduler.schedule(), error)
    assert list(outputs) == [StepOutput(a, error, last=True), StepOutput(held, error, last=True)]
    assert a.status is RequestStatus.FAILED
    # Its holder may be reading the blocks still.
    assert held.status is RequestStatus.HELD
    assert held.block_table
    scheduler.abort(held)
    drain(scheduler)
    assert waiting.status is RequestStatus.FINISHED
    assert_whole(scheduler)


def test_a_later_attempt_goes_on_where_the_earlier_one_ended() -> None:
    scheduler = Scheduler(CONFIG)
    tokens = fake_output(range(6), 8)
    resumed = request(6, max_tokens=8, output=tuple(tokens[:5]))
    scheduler.add(resumed)
    outputs = []
    while not (plan := scheduler.schedule()).empty:
        outputs += [output.event for output in run(scheduler, plan)]
    assert [(e.first_token_index, e.token_ids) for e in outputs if isinstance(e, TokenOutput)] == [
        (5, (tokens[5],)),
        (6, (tokens[6],)),
        (7, (tokens[7],)),
    ]


def test_an_attempt_with_nothing_left_to_do_ends_at_once() -> None:
    scheduler = Scheduler(CONFIG)
    complete = request(6, max_tokens=2, output=(1, 2))
    scheduler.add(complete)
    plan = scheduler.schedule()
    expected = TokenOutput(first_token_index=2, token_ids=(), finish_reason=FinishReason.LENGTH)
    assert plan.outputs == [StepOutput(complete, expected, last=True)]
    assert plan.empty
    assert_whole(scheduler)


# Leases
