"""Leases, reservations and imported prompts in the scheduler, stepped by hand."""

from dataclasses import replace

import pytest

from engine.api import BlockLease, ImportedPrompt, TokenOutput
from engine.leases import Reservation
from engine.scheduler import Scheduler
from pdmesh.errors import InternalError, InvalidRequestError
from pdmesh.types import FinishReason
from tests.fake_model import fake_next, fake_output
from tests.scheduling import CONFIG, assert_whole, drain, request, run, step


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
