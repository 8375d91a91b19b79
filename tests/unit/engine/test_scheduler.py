"""The scheduler, stepped by hand. Tokens come from the fake model's formula; no tensors are involved."""

from dataclasses import replace

import pytest

from engine.api import BlockLease, EngineRequest, ImportedPrompt, PrefillUpdate, TokenOutput
from engine.leases import Reservation
from engine.outputs import StepOutput
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler, SchedulerConfig
from engine.step import PrefillChunk, StepPlan, StepResult
from pdmesh.errors import InternalError, InvalidRequestError
from pdmesh.sampling import SamplingParams
from pdmesh.types import FinishReason
from tests.fake_model import fake_next, fake_output

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
    config = SchedulerConfig(
        num_blocks=100,
        block_size=16,
        max_model_len=1600,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        max_prefill_chunk=512,
        max_mixed_slowdown=2.0,
        max_prefill_wait_s=1.0,
    )
    scheduler = Scheduler(config)
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
    config = SchedulerConfig(
        num_blocks=100,
        block_size=16,
        max_model_len=1600,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        max_prefill_chunk=512,
        max_prefill_wait_s=1.0,
    )
    scheduler = Scheduler(config)
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


def test_held_request_tells_progress_and_keeps_its_blocks_until_released() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request(5))
    drain(scheduler)
    held = request(14, hold=True)
    scheduler.add(held)

    # Before its first step: what the cache had.
    plan = scheduler.schedule()
    blocks = tuple(held.block_table)
    assert plan.outputs == [StepOutput(held, PrefillUpdate(4, 4, blocks[:1]), last=False)]
    # After each step: what was computed.
    assert run(scheduler, plan) == [StepOutput(held, PrefillUpdate(4, 12, blocks[:3]), last=False)]
    # After the last step: the token.
    [output] = run(scheduler, scheduler.schedule())
    token = TokenOutput(0, (fake_next(range(14)),), num_cached_tokens=4)
    assert output == StepOutput(held, PrefillUpdate(4, 14, blocks, token), last=True)

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


def lease_of(scheduler: Scheduler, num_tokens: int) -> BlockLease:
    """Pins what is cached of tokens 0, 1, …"""
    lease = BlockLease()
    scheduler.acquire_prefix(lease, range(num_tokens), b"")
    return lease


def reserve(scheduler: Scheduler, lease: BlockLease, num_blocks: int) -> Reservation:
    reservation = Reservation(lease, num_blocks)
    scheduler.reserve(reservation)
    return reservation


def test_an_imported_prompt_joins_the_batch_and_is_cached() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request(5))
    drain(scheduler)

    # The lease: one cached block, and two more to write to.
    lease = lease_of(scheduler, 10)
    assert lease.num_cached_blocks == len(lease.block_ids) == 1
    reservation = reserve(scheduler, lease, 2)
    assert scheduler.schedule().granted == [reservation]
    assert len(lease.block_ids) == 3
    assert scheduler.status(0).num_leases == 1

    # The import: it passes to the request, which decodes at once.
    imported = request(10)
    first = fake_next(range(10))
    blocks = list(lease.block_ids)
    scheduler.add_imported(imported, ImportedPrompt(lease, first))
    assert scheduler.status(0).num_leases == 0
    assert imported.block_table == blocks
    plan = scheduler.schedule()
    assert (plan.decodes, plan.seated, plan.grown) == ((imported,), [imported], [])
    [output] = run(scheduler, plan)
    second = fake_output(range(10), 2)[1]
    assert output.event == TokenOutput(first_token_index=1, token_ids=(second,), num_cached_tokens=4)

    # The second block was committed: others find it.
    assert lease_of(scheduler, 10).num_cached_blocks == 2


def test_an_imported_prompt_that_its_first_token_ends() -> None:
    scheduler = Scheduler(CONFIG)
    lease = lease_of(scheduler, 6)
    reserve(scheduler, lease, 2)
    scheduler.schedule()
    imported = request(6, max_tokens=1)
    scheduler.add_imported(imported, ImportedPrompt(lease, 3))
    [output] = scheduler.schedule().outputs
    assert output.event == TokenOutput(first_token_index=1, token_ids=(), finish_reason=FinishReason.LENGTH)
    assert output.last
    assert_whole(scheduler)


@pytest.mark.parametrize("released", [True, False])
def test_an_imported_prompt_whose_lease_is_not_right_is_refused(released: bool) -> None:
    scheduler = Scheduler(CONFIG)
    lease = lease_of(scheduler, 6)
    reserve(scheduler, lease, 1)
    scheduler.schedule()
    if released:
        scheduler.release(lease)
    imported = request(6)
    scheduler.add_imported(imported, ImportedPrompt(lease, 3))
    [output] = scheduler.schedule().outputs
    assert isinstance(output.event, InternalError)
    assert output.last
    scheduler.abort(imported)
    assert_whole(scheduler)


def test_imported_prompts_wait_for_seats_and_can_leave_meanwhile() -> None:
    scheduler = Scheduler(replace(CONFIG, max_num_seqs=1))
    running = request(2)
    scheduler.add(running)
    step(scheduler)
    imports = []
    for index in range(2):
        lease = lease_of(scheduler, 1)
        reserve(scheduler, lease, 1)
        scheduler.schedule()
        imports.append(request(3, first=20 + 9 * index))
        scheduler.add_imported(imports[-1], ImportedPrompt(lease, 1))
    assert step(scheduler) == [(running, 1)]
    scheduler.abort(imports[0])
    drain(scheduler)
    assert imports[1].num_output_tokens == 4
    assert_whole(scheduler)


def test_release_is_idempotent_and_empties_the_lease() -> None:
    scheduler = Scheduler(CONFIG)
    lease = lease_of(scheduler, 6)
    reserve(scheduler, lease, 2)
    scheduler.schedule()
    scheduler.release(lease)
    scheduler.release(lease)
    assert lease.block_ids == []
    assert_whole(scheduler)


def test_a_lease_that_no_request_may_have_is_refused() -> None:
    scheduler = Scheduler(CONFIG)
    lease = lease_of(scheduler, 6)
    with pytest.raises(InvalidRequestError, match="9 KV blocks are asked for: a request may have 8 here"):
        reserve(scheduler, lease, 9)
    scheduler.release(lease)
    assert_whole(scheduler)


def test_reservations_are_served_in_turn_and_can_be_cancelled() -> None:
    scheduler = Scheduler(CONFIG)
    leases = [lease_of(scheduler, 1) for _ in range(4)]
    sizes = (8, 5, 4, 2)
    reservations = [reserve(scheduler, lease, size) for lease, size in zip(leases, sizes, strict=True)]
    # 8 + 5 of 16 are granted; the third does not fit and the fourth, which would, does not overtake it.
    assert scheduler.schedule().granted == reservations[:2]
    assert scheduler.schedule().granted == []
    scheduler.cancel_reservation(reservations[2])
    assert scheduler.schedule().granted == [reservations[3]]
    # Cancelled after the grant: the lease is as it was.
    scheduler.cancel_reservation(reservations[1])
    assert leases[1].block_ids == []
    assert scheduler.status(0).num_free_blocks == 16 - 8 - 2
    for lease in leases:
        scheduler.release(lease)
    assert_whole(scheduler)


def test_a_reservation_leaves_running_requests_room_to_grow() -> None:
    scheduler = Scheduler(replace(CONFIG, num_blocks=32))
    running = [request(4, first=10 * i, max_tokens=12) for i in range(2)]
    for r in running:
        scheduler.add(r)
    step(scheduler)
    step(scheduler)
    # Each holds 2 of 32 blocks. With two running, two blocks are kept; the fourth lease would take one of them.
    leases = [lease_of(scheduler, 1) for _ in range(4)]
    reservations = [reserve(scheduler, lease, size) for lease, size in zip(leases, (8, 8, 8, 3), strict=True)]
    assert scheduler.schedule().granted == reservations[:3]


def test_a_waiting_request_and_reservations_take_turns() -> None:
    scheduler = Scheduler(replace(CONFIG, num_blocks=8))
    first = lease_of(scheduler, 1)
    reserve(scheduler, first, 6)
    scheduler.schedule()
    waiting = request(16)
    scheduler.add(waiting)
    second = lease_of(scheduler, 1)
    later = reserve(scheduler, second, 2)
    # The request came first and needs 4 blocks: the later reservation does not overtake it.
    plan = scheduler.schedule()
    assert plan.empty
    assert plan.granted == []
    scheduler.release(first)
    plan = scheduler.schedule()
    assert plan.requests == [waiting]
    assert plan.granted == [later]
    run(scheduler, plan)


def test_leases_that_still_wait_leave_room_for_the_longest_request() -> None:
    """Two leases that pin all blocks between them and wait for more would wait for ever."""
    config = replace(CONFIG, num_blocks=8, max_model_len=24)
    scheduler = Scheduler(config)
    for first in (0, 40):
        scheduler.add(request(15, first=first, max_tokens=1))
        drain(scheduler)
    assert scheduler.pool.num_cached_blocks == 6

    leases = [BlockLease(), BlockLease()]
    for lease, first in zip(leases, (0, 40), strict=True):
        scheduler.acquire_prefix(lease, range(first, first + 24), b"")
    # 8 blocks less the 6 of the longest request: 2 may be pinned, whoever pins them.
    assert [lease.num_cached_blocks for lease in leases] == [2, 0]
    reservations = [reserve(scheduler, lease, 6 - len(lease.block_ids)) for lease in leases]
    assert scheduler.schedule().granted == reservations[:1]
    scheduler.release(leases[0])
    assert scheduler.schedule().granted == reservations[1:]
    scheduler.release(leases[1])
    assert_whole(scheduler)


def test_a_preempted_request_and_leases_do_not_block_each_other() -> None:
    """Leases hold what the only running request needs to grow: it is preempted, and runs once they are done."""
    scheduler = Scheduler(replace(CONFIG, num_blocks=8))
    running = request(7, max_tokens=12)
    scheduler.add(running)
    step(scheduler)
    lease = lease_of(scheduler, 1)
    granted = reserve(scheduler, lease, 6)
    assert scheduler.schedule().granted == [granted]
    while not running.num_preemptions:
        step(scheduler)
    waiting_lease = lease_of(scheduler, 1)
    late = reserve(scheduler, waiting_lease, 2)
    assert scheduler.schedule().granted == []
    imported = request(20, first=30, max_tokens=2)
    scheduler.add_imported(imported, ImportedPrompt(lease, fake_next(range(30, 50))))
    for _ in range(100):
        step(scheduler)
        if running.finished and imported.finished and late.granted:
            break
    assert running.token_ids == [*range(7), *fake_output(range(7), 12)]
    assert late.granted
    scheduler.release(waiting_lease)
    assert_whole(scheduler)
