"""Who is alive, how busy they are and which blocks they hold: the seam between workers, routers and a shared store.

    worker ── Announcer ──▶ Directory ──▶ Watcher ── router

The directory holds hints, never truth: it may be down, slow or emptied at any time, and no request waits for it. All
that a worker wrote expires when the worker stops refreshing it.

A worker's blocks are a snapshot and a stream of events after it. Events of one incarnation are numbered 1, 2, 3, …
without gaps; a snapshot says up to which number it counts. Who sees a number missing starts again from a snapshot.

A worker may hold a block in several tiers. The directory knows the nearest one only: an event says that a block lies
there now, wherever it was before, or that the worker has it no more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.tiers.base import Tier
from pdmesh.errors import UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.types import WorkerInfo

# Block hashes by the nearest tier in which they lie. No hash is named twice, no tier is mapped to nothing.
TieredBlocks = Mapping[Tier, Sequence[BlockHash]]

# How long what a worker wrote outlives its last heartbeat.
TTL_S = 3.0
# How long a departure is told: long enough for every watcher to poll it, also after an outage.
DEPARTURE_TTL_S = 30.0
# Events kept per worker, approximately; those who lag further behind read the snapshot.
MAX_EVENTS = 1024
# Events that one read returns per worker; the next read goes on after them.
MAX_EVENTS_PER_READ = 256


class DirectoryUnavailableError(UnavailableError):
    """The store that holds the directory cannot be reached, or does not answer in time."""

    reason = "DIRECTORY_UNAVAILABLE"


@dataclass(frozen=True, slots=True, order=True)
class WorkerRef:
    """One life of a worker: its name, and the incarnation drawn when its process started."""

    worker_id: str
    incarnation: str

    @classmethod
    def of(cls, info: WorkerInfo) -> "WorkerRef":
        return cls(info.worker_id, info.incarnation)


@dataclass(frozen=True, slots=True)
class Registration:
    """What stands in the directory under a worker's name. `info` is None where it said that it leaves."""

    ref: WorkerRef
    info: WorkerInfo | None


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """What changed in what one worker holds: where blocks lie now, and which are gone. Both may be empty."""

    seq: int
    stored: TieredBlocks = field(default_factory=dict)
    removed: tuple[BlockHash, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockSnapshot:
    """Every block that a worker held after event `seq`, and where; 0 is before the first event."""

    seq: int
    held: TieredBlocks = field(default_factory=dict)


class Directory(Protocol):
    """Every call raises DirectoryUnavailableError, within about a second, where the store cannot be reached.

    A call that raised may or may not have taken effect.
    """

    async def put(self, info: WorkerInfo) -> bool:
        """Registers a worker, or refreshes it and its blocks: the heartbeat is the same call.

        Returns whether the worker's snapshot is still there. If not, the store has lost what this worker wrote (or
        it never wrote any), and the worker is to write a snapshot.
        """
        ...

    async def remove(self, ref: WorkerRef) -> None:
        """Says that `ref` has left; a later incarnation under the same name is not touched."""
        ...

    async def registrations(self) -> list[Registration]:
        """All workers that are there or have just left, at most one per worker_id, in no order."""
        ...

    async def append_event(self, ref: WorkerRef, event: BlockEvent) -> None:
        """Adds an event, whose number must be larger than every one before it."""
        ...

    async def put_snapshot(self, ref: WorkerRef, snapshot: BlockSnapshot) -> None:
        """Replaces the worker's snapshot."""
        ...

    async def events(self, after: Mapping[WorkerRef, int]) -> dict[WorkerRef, list[BlockEvent]]:
        """For each worker, events with larger numbers than it is mapped to, oldest first.

        Workers with none are left out. The first event may be later than the next number: then some are lost.
        """
        ...

    async def snapshot(self, ref: WorkerRef) -> BlockSnapshot | None:
        """The worker's latest snapshot; None where it has none."""
        ...

    async def aclose(self) -> None:
        """Closes connections; idempotent. Registrations stay until they expire."""
        ...
