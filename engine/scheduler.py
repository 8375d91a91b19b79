"""Which request computes how many tokens in the next step, and who gets blocks. Knows ids and counts, no tensors.

One rule serves prefill and decode: a request's num_computed_tokens catches up with its num_tokens. A new request has
its whole prompt to catch up with, in chunks; a decoding one has one token; a preempted one everything it knew.

    add ──▶ waiting ──▶ running ──▶ finished            generate: tokens until it stops
              ▲            │  └───▶ held ──▶ finished   prefill: blocks stay until released
              └─preempted──┘

Who gets blocks, and why nobody waits for ever:
- A waiting request starts only with the blocks of all the tokens it knows; only decoding needs more, one at a time.
- Running requests grow first. Where no block is free, the last of them in order (lowest priority, then latest
  arrival) is preempted: its blocks are freed, its tokens kept, and it waits at its old place.
- Requests that wait and reservations of leases stand in one queue, and only its head is served. So neither kind
  starves the other.
- The head gets its turn: running requests end or are preempted; leases with all their blocks and held requests are
  their holders', who need nothing more from here to be done with them (which is why a held request is never
  preempted); and leases still waiting leave room for the longest request (see engine/leases.py).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from engine.api import BlockEvents, BlockLease, EngineStatus, ImportedPrompt, PrefillUpdate, TokenOutput
from engine.block_pool import BlockPool
from engine.leases import LeaseTable, Reservation
from engine.ordered import Ordered
from engine.prefix_waits import PrefixWaits
from engine.request import Request, RequestStatus, Stop
from engine.step import SampledToken, StepBudget, StepOutput, StepPlan, StepResult
from pdmesh.errors import InternalError, InvalidRequestError, MeshError
from pdmesh.hashing import block_hashes, root_hash
from pdmesh.types import Load


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the scheduler; EngineConfig says what each means."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_chunk: int

    def num_blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def max_request_blocks(self) -> int:
        return self.num_blocks_of(self.max_model_len)

    @property
    def max_headroom_blocks(self) -> int:
        """Most blocks kept free for running requests to grow into."""
        return self.num_blocks // 16


class Scheduler:
    """Owns the block pool, every request and every lease. Not thread-safe.

    A step: `plan = schedule()`, run it, then `update(plan, result)` or `fail(plan, error)`, before anything else.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        assert config.max_request_blocks <= config.num_blocks, "the longest request must fit"
        assert config.max_num_seqs <= config.max_num_batched_tokens, "every running request must fit in a step"
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self._leases = LeaseTable(self.pool, config.num_blocks - config.max_request_blocks)
        self._num_arrivals = 0
        self._waiting: Ordered[Request | Reservation] = Ordered()
        self._prefix_waits = PrefixWaits()
        # Imported: they have their blocks and lack a seat.
        self._joining: deque[Request] = deque()
        self._running: Ordered[Request] = Ordered()
        self._held: set[Request] = set()
        self._seats = list(reversed(range(config.max_num_seqs)))
        self._num_queued_tokens = 0
        self._num_waiting_requests = 0
        self._due: list[StepOutput] = []

    # Requests

    def add(self, request: Request) -> None:
        """Queues a request. One whose earlier output ends it already is answered with the next plan."""
        request.order = (-request.source.priority, self._next_arrival())
        if request.num_output_tokens and (stop := request.check_stop(self.config.max_model_len)):
            self._finish_at_once(request, stop)
        else:
            self._queue(request)

    def add_imported(self, request: Request, imported: ImportedPrompt) -> None:
        """Takes over the lease and lets the request join the batch with its blocks.

        Where these are not those of its tokens, they are freed, and the next plan says so.
        """
        lease = imported.lease
        if lease not in self._leases:
            self._refuse(request, InternalError("the imported prompt's lease was given back already"))
            return
        request.order = (-request.source.priority, self._next_arrival())
        request.num_cached_tokens = lease.num_cached_blocks * self.config.block_size
        request.num_committed_blocks = lease.num_cached_blocks
        request.num_computed_tokens = request.num_prefill_tokens = request.num_tokens
        request.prompt_logprobs = None
        request.token_ids.append(imported.first_token)
        request.block_table = self._leases.pass_on(lease)
        num_needed = self.config.num_blocks_of(request.num_computed_tokens)
        if len(request.block_table) < num_needed:
            num_held = len(request.block_table)
            self._free_blocks(request)
            self._refuse(request, InternalError(f"the lease has {num_held} blocks: its tokens need {num_needed}"))
            return
        self._commit_full_blocks(request)
        if stop := request.check_stop(self.config.max_model_len):
            self._free_blocks(request)
            self._finish_at_once(request, stop)
        else:
            request.status = RequestStatus.RUNNING
            self._joining.append(request)

    def abort(self, request: Request) -> None:
        """Ends a request, or releases a held one's blocks; does nothing to one that is over."""
        if not request.finished:
            self._end(request, RequestStatus.ABORTED)

    # Leases

    def acquire_prefix(self, lease: BlockLease, token_ids: Sequence[int], cache_salt: bytes) -> None:
        """Fills an empty lease; see Engine.acquire_prefix."""
        size = self.config.block_size
        num_usable = (len(token_ids) - 1) // size
        self._leases.pin_prefix(lease, block_hashes(token_ids[: num_usable * size], size, root_hash(cache_salt)))

    def reserve(self, reservation: Reservation) -> None:
        """Queues for blocks; a later plan grants them. Raises InvalidRequestError; see Engine.reserve."""
        lease = reservation.lease
        num_total = len(lease.block_ids) + reservation.num_blocks
        limit = self.config.max_request_blocks
        if reservation.num_blocks < 0 or num_total > limit:
            raise InvalidRequestError(
                f"{num_total} KV blocks are asked for: a request may have {limit} here",
                reason="KV_CACHE_TOO_SMALL",
                details={"limit": str(limit)},
            )
        self._leases.open(lease)
        reservation.order = (0, self._next_arrival())
        self._waiting.add(reservation)

    def cancel_reservation(self, reservation: Reservation) -> None:
        """Leaves the lease as it was before, also where the blocks were granted meanwhile."""
        if reservation.granted:
            self._leases.take_back(reservation)
        elif reservation in self._waiting:
            self._waiting.remove(reservation)

    def release(self, lease: BlockLease) -> None:
        """Gives a lease's blocks back; a second time does nothing. Cancel its reservation first."""
        self._leases.release(lease)

    # A step

    def schedule(self) -> StepPlan:
        """Plans the next step; with nothing in `scheduled`, nothing can run until something is added or given back."""
        budget = StepBudget(self.config.max_num_batched_tokens, self.config.max_prefill_chunk)
        budget.plan.outputs, self._due = self._due, []
        self._seat_joining()
        self._schedule_decodes(budget)
        self._schedule_prefills(budget)
        self._serve_waiting(budget)
        return budget.plan

    def update(self, plan: StepPlan, result: StepResult) -> list[StepOutput]:
        """Takes in what a step computed."""
        outputs: list[StepOutput] = []
        sampled = iter(result.sampled)
        for item in plan.scheduled:
            request = item.request
            if request.num_computed_tokens < request.num_prefill_tokens:
                self._num_queued_tokens -= item.num_tokens
            request.num_computed_tokens += item.num_tokens
            self._commit_full_blocks(request)
            if request.prompt_logprobs is not None:
                request.prompt_logprobs += result.prompt_logprobs[request]
            if item.samples:
                outputs.append(self._append_token(request, next(sampled)))
            elif request.hold_blocks:
                outputs.append(StepOutput(request, self._prefill_update(request), last=False))
        return outputs

    def fail(self, plan: StepPlan, error: MeshError) -> list[StepOutput]:
        """Ends the requests of a step that failed, also those whose outputs an `update` that failed half-way lost."""
        for item in plan.scheduled:
            if item.request.status is RequestStatus.RUNNING:
                if item.request.hold_blocks:
                    # Its holder may be reading the blocks that it was told of: they stay until it lets go.
                    self._hold(item.request)
                else:
                    self._end(item.request, RequestStatus.FAILED)
        return [StepOutput(item.request, error, last=True) for item in plan.scheduled]

    # What it holds

    def load(self) -> Load:
        return Load(
            num_running=len(self._running) + len(self._joining),
            num_waiting=self._num_waiting_requests,
            num_queued_tokens=self._num_queued_tokens,
            num_blocks=self.config.num_blocks,
            num_free_blocks=self.pool.num_free_blocks,
        )

    def status(self, num_steps: int) -> EngineStatus:
        return EngineStatus(
            num_requests=self._num_waiting_requests + len(self._running) + len(self._joining) + len(self._held),
            num_leases=len(self._leases),
            num_blocks=self.config.num_blocks,
            num_free_blocks=self.pool.num_free_blocks,
            num_cached_blocks=self.pool.num_cached_blocks,
            num_steps=num_steps,
        )

    def drain_block_events(self) -> BlockEvents:
        return self.pool.drain_events()

    def check_invariants(self) -> None:
        """Raises AssertionError where requests, leases and pool contradict each other. For tests: O(everything)."""
        self.pool.check_invariants()
        waiting = [entry for entry in self._waiting if isinstance(entry, Request)]
        active = [*self._running, *self._joining, *self._held]
        holders = [block_id for request in active for block_id in request.block_table] + self._leases.held_blocks()
        self.pool.check_holders(holders)
        assert len(waiting) + len(self._prefix_waits) == self._num_waiting_requests
        assert all(request.status is RequestStatus.WAITING and not request.block_table for request in waiting)
        assert len(self._seats) + len(self._running) == self.config.max_num_seqs
        assert len({request.seat for request in self._running}) == len(self._running)
        for request in [*self._running, *self._joining]:
            assert 0 <= request.num_computed_tokens < request.num_tokens
            assert request.num_computed_tokens <= len(request.block_table) * self.config.block_size
        if not waiting and not active and not self._prefix_waits:
            assert self._num_queued_tokens == 0, f"{self._num_queued_tokens} tokens queued by nobody"

    # Scheduling

    def _seat_joining(self) -> None:
        while self._joining and self._seats:
            self._take_seat(self._joining.popleft())

    def _schedule_decodes(self, budget: StepBudget) -> None:
        index = 0
        while index < len(self._running):
            request = self._running[index]
            if request.num_tokens - request.num_computed_tokens > 1:
                index += 1
            elif self._grow(request):
                budget.add(request)
                index += 1

    def _grow(self, request: Request) -> bool:
        """Makes room for the token that a decoding request computes next; False if it had to be preempted itself."""
        if request.num_tokens <= len(request.block_table) * self.config.block_size:
            return True
        while self.pool.num_free_blocks == 0:
            # Victims come after `request` in order, so none of them is in the plan yet.
            victim = next(running for running in reversed(self._running) if not running.hold_blocks)
            self._preempt(victim)
            if victim is request:
                return False
        request.block_table += self.pool.allocate(1)
        return True

    def _schedule_prefills(self, budget: StepBudget) -> None:
        for request in self._running:
            if not budget.num_tokens:
                break
            if request.num_tokens - request.num_computed_tokens > 1:
                budget.add(request)

    def _serve_waiting(self, budget: StepBudget) -> None:
        """Serves the queue in its order until its head lacks something."""
        while self._waiting:
            head = self._waiting[0]
            if isinstance(head, Reservation):
                if head.num_blocks > self._num_spare_blocks():
                    break
                self._waiting.remove(head)
                self._leases.grant(head)
                budget.plan.granted.append(head)
            elif not (self._seats and budget.num_tokens and self._start_or_park(head, budget)):
                break

    def _start_or_park(self, request: Request, budget: StepBudget) -> bool:
        """Takes the head out of the queue; False if it must stay, for lack of blocks."""
        size = self.config.block_size
        num_full = request.num_tokens // size
        num_usable = 0
        cached: list[int] = []
        request.extend_hashes(num_full, size)
        # Logprobs of prompt tokens exist only where these are computed. The last token is always computed, for the
        # next one is sampled from it.
        if request.prompt_logprobs is None:
            num_usable = (request.num_tokens - 1) // size
            cached = self.pool.lookup(request.block_hashes[:num_usable])
        if len(cached) < num_usable and self._prefix_waits.wait(request, request.block_hashes[len(cached)]):
            self._waiting.remove(request)
            return True
        num_new = self.config.num_blocks_of(request.num_tokens) - len(cached)
        if num_new + self.pool.num_free_among(cached) > self._num_spare_blocks():
            return False

        self._waiting.remove(request)
        self._num_waiting_requests -= 1
        self.pool.acquire(cached)
        request.block_table = cached + self.pool.allocate(num_new)
        request.num_committed_blocks = len(cached)
        request.num_computed_tokens = len(cached) * size
        self._num_queued_tokens -= request.num_computed_tokens
        self._announce_next_block(request)
        self._take_seat(request)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
            if request.hold_blocks:
                budget.plan.outputs.append(StepOutput(request, self._prefill_update(request), last=False))
        budget.add(request)
        return True

    def _num_spare_blocks(self) -> int:
        """Blocks that newcomers may take: running requests keep some to grow into, lest they be preempted at once."""
        return self.pool.num_free_blocks - min(len(self._running), self.config.max_headroom_blocks)

    def _take_seat(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        request.seat = self._seats.pop()
        self._running.add(request)

    def _preempt(self, request: Request) -> None:
        request.num_preemptions += 1
        self._leave_batch(request)
        self._free_blocks(request)
        if request.prompt_logprobs is not None:
            request.prompt_logprobs.clear()
        # What it had not yet computed of its prefill is counted anew with the rest.
        self._num_queued_tokens -= max(0, request.num_prefill_tokens - request.num_computed_tokens)
        request.num_computed_tokens = 0
        self._queue(request)

    # Results

    def _commit_full_blocks(self, request: Request) -> None:
        num_full = request.num_computed_tokens // self.config.block_size
        if num_full <= request.num_committed_blocks:
            return
        request.extend_hashes(num_full, self.config.block_size)
        for index in range(request.num_committed_blocks, num_full):
            self.pool.commit(request.block_table[index], request.block_hashes[index])
        request.num_committed_blocks = num_full
        if request.computing is not None:
            self._wake(request)
            self._announce_next_block(request)

    def _announce_next_block(self, request: Request) -> None:
        index = request.num_committed_blocks
        if index < request.num_tokens // self.config.block_size:
            self._prefix_waits.announce(request, request.block_hashes[index])

    def _wake(self, request: Request) -> None:
        for waiter in self._prefix_waits.settle(request):
            self._waiting.add(waiter)

    def _append_token(self, request: Request, sampled: SampledToken) -> StepOutput:
        index = request.num_output_tokens
        request.token_ids.append(sampled.token_id)
        stop = request.check_stop(self.config.max_model_len)
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        output = TokenOutput(
            first_token_index=index,
            token_ids=(sampled.token_id,),
            logprobs=() if sampled.logprob is None else (sampled.logprob,),
            prompt_logprobs=tuple(prompt_logprobs or ()),
            num_cached_tokens=self._num_cached_prompt_tokens(request),
            finish_reason=stop.reason if stop else None,
            matched_token_id=stop.matched_token_id if stop else None,
        )
        if request.hold_blocks:
            update = self._prefill_update(request, output)
            self._hold(request)
            return StepOutput(request, update, last=True)
        if stop:
            self._end(request, RequestStatus.FINISHED)
        return StepOutput(request, output, last=stop is not None)

    def _prefill_update(self, request: Request, output: TokenOutput | None = None) -> PrefillUpdate:
        num_blocks = self.config.num_blocks_of(request.num_computed_tokens)
        return PrefillUpdate(
            num_cached_tokens=request.num_cached_tokens or 0,
            num_computed_tokens=request.num_computed_tokens,
            block_ids=tuple(request.block_table[:num_blocks]),
            output=output,
        )

    def _num_cached_prompt_tokens(self, request: Request) -> int:
        return min(request.num_cached_tokens or 0, request.num_prompt_tokens)

    def _finish_at_once(self, request: Request, stop: Stop) -> None:
        """Answers a request that has nothing left to generate."""
        request.status = RequestStatus.FINISHED
        output = TokenOutput(
            first_token_index=request.num_output_tokens,
            token_ids=(),
            num_cached_tokens=self._num_cached_prompt_tokens(request),
            finish_reason=stop.reason,
            matched_token_id=stop.matched_token_id,
        )
        event = PrefillUpdate(0, 0, (), output) if request.hold_blocks else output
        self._due.append(StepOutput(request, event, last=True))

    def _refuse(self, request: Request, error: MeshError) -> None:
        request.status = RequestStatus.FAILED
        self._due.append(StepOutput(request, error, last=True))

    # Places

    def _next_arrival(self) -> int:
        self._num_arrivals += 1
        return self._num_arrivals

    def _queue(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        request.num_prefill_tokens = request.num_tokens
        self._num_queued_tokens += request.num_tokens
        self._num_waiting_requests += 1
        self._waiting.add(request)

    def _hold(self, request: Request) -> None:
        self._num_queued_tokens -= max(0, request.num_prefill_tokens - request.num_computed_tokens)
        self._leave_batch(request)
        request.status = RequestStatus.HELD
        self._held.add(request)

    def _end(self, request: Request, status: RequestStatus) -> None:
        """Takes a request from where it is and frees what it holds."""
        if request.status is RequestStatus.WAITING:
            if request.awaiting is not None:
                self._prefix_waits.leave(request)
            else:
                self._waiting.remove(request)
            self._num_waiting_requests -= 1
        elif request.status is RequestStatus.HELD:
            self._held.remove(request)
        else:
            self._leave_batch(request)
        if request.status is not RequestStatus.HELD:
            self._num_queued_tokens -= max(0, request.num_prefill_tokens - request.num_computed_tokens)
        self._free_blocks(request)
        request.status = status

    def _leave_batch(self, request: Request) -> None:
        if request.seat < 0:
            self._joining.remove(request)
            return
        self._wake(request)
        self._running.remove(request)
        self._seats.append(request.seat)
        request.seat = -1

    def _free_blocks(self, request: Request) -> None:
        self.pool.free(request.block_table)
        request.block_table = []
        request.num_committed_blocks = request.num_planned_blocks = 0
