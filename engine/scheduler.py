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

from engine import outputs
from engine.api import BlockEvents, BlockLease, EngineStatus, ImportedPrompt
from engine.block_pool import BlockPool
from engine.leases import LeaseTable, Reservation
from engine.ordered import Ordered
from engine.outputs import StepOutput, StepOutputs
from engine.prefill_share import PrefillShare
from engine.prefix_waits import PrefixWaits
from engine.request import Request, RequestStatus, Stop
from engine.running import RunningRequests
from engine.step import PrefillBudget, StepPlan, StepResult
from pdmesh.errors import InternalError, InvalidRequestError, MeshError
from pdmesh.hashing import BlockHash, block_hashes, root_hash
from pdmesh.types import Load


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the scheduler; EngineConfig says what each means.

    Attributes:
        num_full_rate_tokens: Prompt tokens with which a step computes at the machine's full rate; a further prompt
            joins it only below that.
        max_mixed_slowdown: How many times as long as its decodes alone a step with prompt tokens beside them may take;
            see engine/prefill_share.py.
        max_prefill_wait_s: Time in which queued prompts should be computed, even if that slows decodes down more.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_chunk: int
    num_full_rate_tokens: int = 128
    max_mixed_slowdown: float = 1.75
    max_prefill_wait_s: float = 2.0

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
        self._running = RunningRequests(config.max_num_seqs)
        # Decodes whose blocks are full, the next token's not there yet.
        self._outgrown: list[Request] = []
        self._held: set[Request] = set()
        self._prefill_share = PrefillShare(max_slowdown=config.max_mixed_slowdown, max_wait_s=config.max_prefill_wait_s)
        self._num_queued_tokens = 0
        self._num_waiting_requests = 0
        self._due: list[StepOutput] = []

    # Requests

    def add(self, request: Request) -> None:
        """Queues a request. One whose earlier output ends it already is answered with the next plan."""
        self._register(request)
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
        self._register(request)
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

    def acquire_blocks(self, lease: BlockLease, hashes: Sequence[BlockHash]) -> None:
        """Fills an empty lease; see Engine.acquire_blocks."""
        self._leases.pin_prefix(lease, list(hashes))

    def commit(self, lease: BlockLease, first: int, hashes: Sequence[BlockHash]) -> None:
        """Offers written blocks of a lease to the prefix cache; does nothing to a released one."""
        if lease in self._leases:
            for block_id, block_hash in zip(lease.block_ids[first:], hashes, strict=False):
                self.pool.commit(block_id, block_hash)

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
        """Plans the next step; an empty plan says that nothing can run until something is added or given back."""
        plan = StepPlan(outputs=self._due)
        self._due = []
        self._seat_joining()
        self._grow_decodes(plan)
        plan.decodes = self._running.decoding.snapshot()
        budget = PrefillBudget(
            plan, self._max_prefill_tokens(), self.config.max_prefill_chunk, self.config.num_full_rate_tokens
        )
        for request in self._running.prefilling:
            if budget.open:
                budget.add(request)
        self._serve_waiting(budget)
        plan.seated = self._running.take_newly_seated()
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> StepOutputs:
        """Takes in what a step computed."""
        made = StepOutputs(logprobs=result.logprobs)
        token_ids = iter(result.token_ids)
        for request, token_id in zip(plan.decodes, token_ids, strict=False):
            request.num_computed_tokens += 1
            if not request.num_computed_tokens % self.config.block_size:
                self._commit_full_blocks(request)
                self._note_full_blocks(request)
            self._append_token(request, token_id, made)
        for request, num_tokens, samples in plan.prefills:
            self._num_queued_tokens -= num_tokens
            request.num_computed_tokens += num_tokens
            self._commit_full_blocks(request)
            if request.prompt_logprobs is not None:
                request.prompt_logprobs += result.prompt_logprobs[request]
            if samples:
                self._end_prefill(request, next(token_ids), made)
            elif request.hold_blocks:
                made.events.append(StepOutput(request, outputs.progress(request, self.config.block_size), last=False))
        return made

    def record_duration(self, num_tokens: int, duration_s: float) -> None:
        """Tells how long a step of so many tokens took: what later steps of prompts and decodes are measured by."""
        self._prefill_share.record(num_tokens, duration_s)

    def fail(self, plan: StepPlan, error: MeshError) -> StepOutputs:
        """Ends the requests of a step that failed, also those whose outputs an `update` that failed half-way lost."""
        for request in plan.requests:
            if request.status is RequestStatus.RUNNING:
                if request.hold_blocks:
                    # Its holder may be reading the blocks that it was told of: they stay until it lets go.
                    self._hold(request)
                else:
                    self._end(request, RequestStatus.FAILED)
        return StepOutputs(events=[StepOutput(request, error, last=True) for request in plan.requests])

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
            prefill_token_s=self._prefill_share.token_s(self.config.max_prefill_chunk),
        )

    def drain_block_events(self) -> BlockEvents:
        return self.pool.drain_events()

    def check_invariants(self) -> None:
        """Raises AssertionError where requests, leases and pool contradict each other. For tests: O(everything)."""
        self.pool.check_invariants()
        waiting = [entry for entry in self._waiting if isinstance(entry, Request)]
        self._running.check_invariants(self.config.block_size)
        active = [*self._running.decoding, *self._running.prefilling, *self._joining, *self._held]
        holders = [block_id for request in active for block_id in request.block_table] + self._leases.held_blocks()
        self.pool.check_holders(holders)
        assert len(waiting) + len(self._prefix_waits) == self._num_waiting_requests
        assert all(request.status is RequestStatus.WAITING and not request.block_table for request in waiting)
        if not waiting and not active and not self._prefix_waits:
            assert self._num_queued_tokens == 0, f"{self._num_queued_tokens} tokens queued by nobody"

    # Scheduling

    def _seat_joining(self) -> None:
        while self._joining and not self._running.full:
            request = self._joining.popleft()
            self._running.seat(request, decoding=True)
            self._note_full_blocks(request)

    def _note_full_blocks(self, request: Request) -> None:
        """Has a decoding request get another block with the next plan, if it needs one."""
        if request.num_computed_tokens == len(request.block_table) * self.config.block_size:
            self._outgrown.append(request)

    def _grow_decodes(self, plan: StepPlan) -> None:
        """Makes room for the token that each decoding request computes next, or takes it out of the batch."""
        for request in sorted(self._outgrown, key=lambda request: request.order):
            # Victims come after `request` in order, so none of them has grown in this plan.
            while request.decoding and not self.pool.num_free_blocks:
                self._preempt(self._running.last_preemptible())
            if request.decoding:
                request.block_table += self.pool.allocate(1)
                plan.grown.append(request)
        self._outgrown.clear()

    def _max_prefill_tokens(self) -> int:
        """What decodes leave of the next step, as far as it is good for them that prompts take it."""
        num_decodes = len(self._running.decoding)
        num_left = self.config.max_num_batched_tokens - num_decodes
        limit = self._prefill_share.max_tokens(num_decodes, self._num_queued_tokens)
        return num_left if limit is None else min(limit, num_left)

    def _serve_waiting(self, budget: PrefillBudget) -> None:
        """Serves the queue in its order until its head lacks something."""
        while self._waiting:
            head = self._waiting[0]
            if isinstance(head, Reservation):
                if head.num_blocks > self._num_spare_blocks():
                    break
                self._waiting.remove(head)
                self._leases.grant(head)
                budget.plan.granted.append(head)
            elif self._running.full or not budget.open or not self._start_or_park(head, budget):
                break

    def _start_or_park(self, request: Request, budget: PrefillBudget) -> bool:
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
        request.status = RequestStatus.RUNNING
        self._running.seat(request, decoding=False)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
            if request.hold_blocks:
                budget.plan.outputs.append(StepOutput(request, outputs.progress(request, size), last=False))
        budget.add(request)
        return True

    def _num_spare_blocks(self) -> int:
        """Blocks that newcomers may take: running requests keep some to grow into, lest they be preempted at once."""
        return self.pool.num_free_blocks - min(len(self._running), self.config.max_headroom_blocks)

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

    def _append_token(self, request: Request, token_id: int, made: StepOutputs) -> None:
        """Takes in the token that a decode or the end of a prompt made; ends the request if it is the last."""
        token_ids = request.token_ids
        token_ids.append(token_id)
        stop = None
        if token_id in request.stop_token_ids or len(token_ids) >= request.max_num_tokens:
            stop = request.check_stop(self.config.max_model_len)
            if stop is not None and not request.hold_blocks:
                self._end(request, RequestStatus.FINISHED)
        made.tokens.append((request, len(token_ids) - request.num_prompt_tokens - 1, token_id, stop))

    def _end_prefill(self, request: Request, token_id: int, made: StepOutputs) -> None:
        if request.prompt_logprobs is not None:
            made.prompt_logprobs[request] = request.prompt_logprobs
            request.prompt_logprobs = None
        self._append_token(request, token_id, made)
        if request.hold_blocks:
            output = made.token_output(made.tokens.pop())
            event = outputs.progress(request, self.config.block_size, output)
            made.events.append(StepOutput(request, event, last=True))
            self._hold(request)
        elif request.status is RequestStatus.RUNNING:
            self._running.begin_decoding(request)
            self._note_full_blocks(request)

    def _finish_at_once(self, request: Request, stop: Stop) -> None:
        request.status = RequestStatus.FINISHED
        self._due.append(outputs.nothing_to_generate(request, stop))

    def _refuse(self, request: Request, error: MeshError) -> None:
        request.status = RequestStatus.FAILED
        self._due.append(StepOutput(request, error, last=True))

    # Places

    def _register(self, request: Request) -> None:
        request.order = (-request.source.priority, self._next_arrival())
        request.max_num_tokens = min(request.max_num_tokens, self.config.max_model_len)

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

    def _free_blocks(self, request: Request) -> None:
        self.pool.free(request.block_table)
        request.block_table = []
        request.num_committed_blocks = 0
