"""A directory in this process, for tests and for a mesh that lives in one process.

Keeps the promises of the Redis one, expiry included, and can be made to fail like it: `reachable = False` is an
outage, `lose_everything` a restart with empty memory.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from kvstore.directory import (
    DEPARTURE_TTL_S,
    MAX_EVENTS,
    MAX_EVENTS_PER_READ,
    TTL_S,
    BlockEvent,
    BlockSnapshot,
    DirectoryUnavailableError,
    Registration,
    WorkerRef,
)
from pdmesh.types import WorkerInfo


@dataclass(slots=True)
class _Blocks:
    expires_at: float
    events: deque[BlockEvent] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    snapshot: BlockSnapshot | None = None


class MemoryDirectory:
    """A `Directory`; see the module.

    Args:
        ttl_s: How long what a worker wrote outlives its last heartbeat.
        clock: Seconds, monotonic.
    """

    def __init__(self, ttl_s: float = TTL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.reachable = True
        self._ttl_s = ttl_s
        self._clock = clock
        self._registrations: dict[str, tuple[Registration, float]] = {}
        self._blocks: dict[WorkerRef, _Blocks] = {}

    def lose_everything(self) -> None:
        self._registrations.clear()
        self._blocks.clear()

    async def put(self, info: WorkerInfo) -> bool:
        now = self._expire()
        ref = WorkerRef.of(info)
        self._registrations[info.worker_id] = (Registration(ref, info), now + self._ttl_s)
        blocks = self._blocks.get(ref)
        if blocks is None:
            return False
        blocks.expires_at = now + self._ttl_s
        return blocks.snapshot is not None

    async def remove(self, ref: WorkerRef) -> None:
        now = self._expire()
        registration, _ = self._registrations.get(ref.worker_id, (None, 0.0))
        if registration is None or registration.ref == ref:
            self._registrations[ref.worker_id] = (Registration(ref, None), now + DEPARTURE_TTL_S)
        self._blocks.pop(ref, None)

    async def registrations(self) -> list[Registration]:
        self._expire()
        return [registration for registration, _ in self._registrations.values()]

    async def append_event(self, ref: WorkerRef, event: BlockEvent) -> None:
        self._blocks_of(ref).events.append(event)

    async def put_snapshot(self, ref: WorkerRef, snapshot: BlockSnapshot) -> None:
        self._blocks_of(ref).snapshot = snapshot

    async def events(self, after: Mapping[WorkerRef, int]) -> dict[WorkerRef, list[BlockEvent]]:
        self._expire()
        found = {}
        for ref, last_seq in after.items():
            if ref in self._blocks:
                later = (event for event in self._blocks[ref].events if event.seq > last_seq)
                found[ref] = list(islice(later, MAX_EVENTS_PER_READ))
        return {ref: events for ref, events in found.items() if events}

    async def snapshot(self, ref: WorkerRef) -> BlockSnapshot | None:
        self._expire()
        return self._blocks[ref].snapshot if ref in self._blocks else None

    async def aclose(self) -> None:
        return

    def _blocks_of(self, ref: WorkerRef) -> _Blocks:
        expires_at = self._expire() + self._ttl_s
        blocks = self._blocks.setdefault(ref, _Blocks(expires_at))
        blocks.expires_at = expires_at
        return blocks

    def _expire(self) -> float:
        """Drops what has expired; returns the time. Raises DirectoryUnavailableError in an outage."""
        if not self.reachable:
            raise DirectoryUnavailableError("the in-process directory is set to be unreachable")
        now = self._clock()
        for worker_id in [key for key, (_, expires_at) in self._registrations.items() if expires_at <= now]:
            del self._registrations[worker_id]
        for ref in [ref for ref, blocks in self._blocks.items() if blocks.expires_at <= now]:
            del self._blocks[ref]
        return now
