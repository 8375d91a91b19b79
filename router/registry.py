"""The workers as this router sees them: who lives, who may pair with whom, and how busy each is right now.

Load comes from two sources. A heartbeat says what a worker had when it was written; since then this router has given it
requests and had others end. Both are kept together here, and an assignment counts from the moment it is made, so that
a burst between two heartbeats spreads over the pool.

A worker that a call could not reach takes no requests until the directory has a newer sign of life of it: news of it,
or a registration that would have expired had nobody refreshed it since. Where nobody else is left it is tried all the
same: a call to the dead fails at once, and the directory may be down while the worker is not.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvstore.directory import TTL_S, TieredBlocks
from kvstore.tiers.base import Tier
from pdmesh.hashing import BlockHash
from pdmesh.types import KVSource, ModelInfo, PairingFacts, Role, WorkerInfo, WorkerState
from router.index import CachedPrefix, PrefixIndex
from router.policy import Candidate, Choice

log = logging.getLogger(__name__)

# Others that a prefill worker is told of. The second is for when the first has gone, or has dropped the blocks.
MAX_KV_SOURCES = 2

# What workers have of one prompt, by block size and worker_id.
CachedPrefixes = Mapping[int, Mapping[str, CachedPrefix]]

_NOTHING = CachedPrefix(0, 0)


@dataclass(eq=False, slots=True)
class _Worker:
    """A worker and what this router knows beyond its last heartbeat."""

    info: WorkerInfo
    lost_at: float | None = None
    num_assigned: int = 0
    turn: int = 0
    # Since the last heartbeat, which counts itself in `num_heartbeats`.
    num_heartbeats: int = 0
    requests_since: int = 0
    tokens_since: int = 0
    blocks_since: int = 0


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One line of what `pdmesh status` shows; see cluster.proto."""

    info: WorkerInfo
    age_s: float
    num_assigned: int
    excluded_because: str


class WorkerRegistry:
    """A `kvstore.watcher.WatchListener`. Owned by one event loop; nothing here awaits.

    Args:
        model_name: Workers of another model are left alone.
        age_s: Seconds since the directory last had a worker registered, by its id.
        on_change: Called when who lives, or in what state, has changed.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        model_name: str,
        age_s: Callable[[str], float],
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model_name = model_name
        self._age_s = age_s
        self._clock = clock
        self._on_change = on_change
        self._workers: dict[str, _Worker] = {}
        # Gone from the directory with requests of ours still on them.
        self._departed: list[_Worker] = []
        self._index = PrefixIndex()
        self._turns = 0
        self._told: set[tuple[str, str]] = set()

    # What the directory says.

    def worker_seen(self, info: WorkerInfo) -> None:
        known = self._workers.get(info.worker_id)
        if known is None or known.info.incarnation != info.incarnation:
            if known is not None:
                self._forget(known)
            self._workers[info.worker_id] = _Worker(info)
            log.info("%s worker at %s: %s", info.role.value, info.address, info.state.value, extra=_extra(info))
            self._on_change()
            return
        changed = known.lost_at is not None or known.info.state is not info.state
        if known.lost_at is not None:
            log.info("heard of again", extra=_extra(info))
        elif changed:
            log.info("is %s", info.state.value, extra=_extra(info))
        known.info, known.lost_at = info, None
        known.num_heartbeats += 1
        known.requests_since = known.tokens_since = known.blocks_since = 0
        if changed:
            self._on_change()

    def worker_gone(self, worker_id: str, incarnation: str, reason: str) -> None:
        known = self._workers.get(worker_id)
        if known is None or known.info.incarnation != incarnation:
            return
        log.info("gone: %s", reason, extra=_extra(known.info))
        self._forget(known)
        self._on_change()

    def blocks_stored(self, worker_id: str, hashes: Sequence[BlockHash], tier: Tier) -> None:
        self._index.store(worker_id, hashes, tier)

    def blocks_removed(self, worker_id: str, hashes: Sequence[BlockHash]) -> None:
        self._index.remove(worker_id, hashes)

    def blocks_reset(self, worker_id: str, held: TieredBlocks) -> None:
        self._index.reset(worker_id, held)

    # What calls find out.

    def mark_lost(self, worker_id: str, incarnation: str, because: str) -> None:
        """A call could not reach it: no requests until its next sign of life."""
        known = self._workers.get(worker_id)
        if known is None or known.info.incarnation != incarnation or self._lost(known):
            return
        log.warning("lost: %s", because, extra=_extra(known.info))
        known.lost_at = self._clock()
        self._on_change()

    # Who may serve.

    def usable(self, role: Role) -> bool:
        """Whether any worker of this role takes requests."""
        return bool(self._usable(role))

    def loading(self, role: Role) -> bool:
        """Whether a worker of this role is on its way."""
        return any(w.info.role is role and w.info.state is WorkerState.LOADING for w in self._workers.values())

    def info(self, worker_id: str) -> WorkerInfo | None:
        known = self._workers.get(worker_id)
        return known.info if known else None

    def models(self) -> list[ModelInfo]:
        """The models of decode workers that may be given requests, each once."""
        return list(dict.fromkeys(w.info.model for w in self._triable(Role.DECODE) if w.info.model is not None))

    def addresses(self) -> set[str]:
        """Where workers listen that are known, or still hold requests of this router."""
        self._departed = [worker for worker in self._departed if worker.num_assigned]
        return {worker.info.address for worker in (*self._workers.values(), *self._departed)}

    def block_sizes(self) -> set[int]:
        """The block sizes by which a prompt's hashes may be asked for."""
        takers = (w.info for w in self._workers.values() if w.info.role is not Role.STORE)
        return {info.facts.block_size for info in takers if info.facts is not None}

    def cached_prefixes(self, hashes: Mapping[int, Sequence[BlockHash]]) -> CachedPrefixes:
        """What everybody has of a prompt, by the prompt's block hashes by block size."""
        return {size: self._index.longest_prefixes(blocks) for size, blocks in hashes.items()}

    def candidates(self, role: Role, cached: CachedPrefixes) -> list[Candidate]:
        """The workers of `role` that may be given a request now.

        Args:
            cached: What everybody has of the prompt; at a block size that is missing, nobody has anything.
        """
        assert role is not Role.STORE, "stores take no requests"
        found = []
        for worker in self._triable(role):
            info, facts = worker.info, worker.info.facts
            if facts is None:
                continue
            load = info.load
            prefix = cached.get(facts.block_size, {}).get(info.worker_id, _NOTHING)
            found.append(
                Candidate(
                    worker_id=info.worker_id,
                    cached_tokens=prefix.num_blocks * facts.block_size,
                    pool_tokens=prefix.num_pool_blocks * facts.block_size,
                    queued_tokens=max(load.num_queued_tokens + worker.tokens_since, 0),
                    num_requests=max(load.num_running + load.num_waiting + worker.requests_since, 0),
                    used_blocks=min(load.num_blocks - load.num_free_blocks + worker.blocks_since, load.num_blocks),
                    num_blocks=load.num_blocks,
                    turn=worker.turn,
                    pairs_with=self._partners(info, facts) if role is Role.DECODE else frozenset(),
                )
            )
        return found

    def assign(self, choice: Choice, num_tokens: int, cached: CachedPrefixes) -> "Assignment":
        """Counts a prompt of `num_tokens` up where `choice` sends it; the caller closes what this returns.

        `choice` was made of candidates that this registry gave for `cached`, with no await since.
        """
        decode = self._workers[choice.decode_id]
        prefill = [self._workers[worker_id] for worker_id in choice.prefill_ids]
        assert decode.info.facts is not None, "a candidate that says nothing of itself"
        blocks = -(-num_tokens // decode.info.facts.block_size)
        self._turns += 1
        return Assignment(
            decode.info,
            tuple(PrefillPlace(worker.info, self._sources(worker.info, num_tokens, cached)) for worker in prefill),
            _Share(decode, choice.decode_tokens, blocks, self._turns),
            _Share(prefill[0], choice.prefill_tokens, blocks, self._turns) if prefill else None,
        )

    def _sources(self, target: WorkerInfo, num_tokens: int, cached: CachedPrefixes) -> tuple[KVSource, ...]:
        """Who else has a longer run of the prompt's blocks than `target`, best first.

        The longest run, then stores, who have nothing else to do, then whoever has fewest requests. Whoever drains
        takes no requests, and is as good a source as any until it leaves.
        """
        facts = target.facts
        assert facts is not None, "a candidate that says nothing of itself"
        prefixes = cached.get(facts.block_size, {})
        num_own = prefixes.get(target.worker_id, _NOTHING).num_blocks
        # The last token is always computed: nobody needs the block that ends with it.
        num_wanted = (num_tokens - 1) // facts.block_size
        found = []
        for worker_id, prefix in prefixes.items():
            num_blocks = min(prefix.num_blocks, num_wanted)
            if num_blocks <= num_own:
                continue
            worker = self._workers[worker_id]
            info, load = worker.info, worker.info.load
            if info.facts == facts and not self._lost(worker):
                num_requests = load.num_running + load.num_waiting + worker.requests_since
                rank = (-num_blocks, info.role is not Role.STORE, num_requests, worker_id)
                found.append((rank, KVSource(worker_id, info.incarnation, info.address, num_blocks)))
        return tuple(source for _, source in sorted(found)[:MAX_KV_SOURCES])

    # For people.

    def records(self) -> list[WorkerRecord]:
        return [
            WorkerRecord(
                worker.info,
                self._age_s(worker.info.worker_id),
                worker.num_assigned,
                self._excluded_because(worker),
            )
            for worker in sorted(self._workers.values(), key=lambda w: (w.info.role.value, w.info.worker_id))
        ]

    def _forget(self, worker: _Worker) -> None:
        info = worker.info
        del self._workers[info.worker_id]
        self._departed.append(worker)
        self._index.reset(info.worker_id)
        self._told = {pair for pair in self._told if info.incarnation not in pair}

    def _usable(self, role: Role) -> list[_Worker]:
        return [w for w in self._workers.values() if w.info.role is role and not self._unusable_because(w)]

    def _triable(self, role: Role) -> list[_Worker]:
        """The usable ones; where there are none, those that would be if a call had not failed."""
        usable = self._usable(role)
        return usable or [w for w in self._workers.values() if w.info.role is role and not self._unfit_because(w.info)]

    def _lost(self, worker: _Worker) -> bool:
        if worker.lost_at is None:
            return False
        found_at = self._clock() - self._age_s(worker.info.worker_id)
        return found_at <= worker.lost_at + TTL_S

    def _unusable_because(self, worker: _Worker) -> str:
        because = self._unfit_because(worker.info)
        if not because and self._lost(worker):
            return "a call could not reach it; waiting for its next sign of life"
        return because

    def _unfit_because(self, info: WorkerInfo) -> str:
        if info.role is Role.STORE and info.facts is not None:
            # Also while it drains: KV is had from it to the last.
            return ""
        if info.state is not WorkerState.READY:
            return str(info.state.value)
        if info.model is None or info.facts is None:
            return "does not say what it serves"
        if info.model.name != self._model_name:
            return f"serves {info.model.name}; this router serves {self._model_name}"
        return ""

    def _excluded_because(self, worker: _Worker) -> str:
        because = self._unusable_because(worker)
        if because or worker.info.role is Role.DECODE or worker.info.facts is None:
            return because
        # Whom its KV goes to.
        role = Role.DECODE if worker.info.role is Role.PREFILL else Role.PREFILL
        mismatch = ""
        for other in self._usable(role):
            if other.info.facts is not None:
                mismatch = worker.info.facts.mismatch(other.info.facts)
                if not mismatch:
                    return ""
        return f"can pair with no {role.value} worker: {mismatch}" if mismatch else ""

    def _partners(self, decode: WorkerInfo, facts: PairingFacts) -> frozenset[str]:
        partners = []
        for worker in self._usable(Role.PREFILL):
            theirs = worker.info.facts
            if theirs == facts:
                partners.append(worker.info.worker_id)
            elif theirs is not None and (pair := (decode.incarnation, worker.info.incarnation)) not in self._told:
                self._told.add(pair)
                log.warning(
                    "%s cannot pair with %s: %s", decode.worker_id, worker.info.worker_id, facts.mismatch(theirs)
                )
        return frozenset(partners)


class _Share:
    """One request's part of one worker's load, until closed."""

    __slots__ = ("_blocks", "_heartbeat", "_open", "_tokens", "_worker")

    def __init__(self, worker: _Worker, tokens: int, blocks: int, turn: int) -> None:
        self._worker, self._tokens, self._blocks = worker, tokens, blocks
        self._heartbeat = worker.num_heartbeats
        self._open = True
        worker.turn = turn
        worker.num_assigned += 1
        worker.requests_since += 1
        worker.tokens_since += tokens
        worker.blocks_since += blocks

    def computed(self) -> None:
        """The tokens are computed and wait no longer."""
        if self._worker.num_heartbeats == self._heartbeat:
            self._worker.tokens_since -= self._tokens
        self._tokens = 0

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self.computed()
        self._worker.num_assigned -= 1
        # A heartbeat that came in between has counted this request: its end is news to it.
        self._worker.requests_since -= 1
        if self._worker.num_heartbeats == self._heartbeat:
            self._worker.blocks_since -= self._blocks


@dataclass(frozen=True, slots=True)
class PrefillPlace:
    """A prefill worker that may be asked, and who else has more of the prompt, best first."""

    info: WorkerInfo
    sources: tuple[KVSource, ...]


class Assignment:
    """A request's place on its workers. `close` gives it back; idempotent."""

    def __init__(
        self, decode: WorkerInfo, prefill: tuple[PrefillPlace, ...], decode_share: _Share, prefill_share: _Share | None
    ) -> None:
        self.decode = decode
        self.prefill = prefill
        self._decode_share = decode_share
        self._prefill_share = prefill_share

    def prompt_done(self) -> None:
        """The first token is there: the prefill worker is through with it."""
        self._decode_share.computed()
        if self._prefill_share is not None:
            self._prefill_share.close()

    def close(self) -> None:
        self._decode_share.close()
        if self._prefill_share is not None:
            self._prefill_share.close()


def _extra(info: WorkerInfo) -> dict[str, str]:
    return {"worker_id": info.worker_id}
