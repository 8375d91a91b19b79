"""What one process knows of its KV transfers: those under way, how they ended, which transports were chosen and why.

    entry = journal.begin(Direction.RECEIVING, …)     listed as live
    entry.state = "waiting for the sender"            in words, whenever it changes
    entry.first_byte()                                the wait is over: queue seconds
    entry.end(Outcome.DONE, …) or entry.fail(error, …)

Everything here may be called from any thread, takes microseconds, and is bounded whatever the callers do.
"""

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace

from prometheus_client import CollectorRegistry

from kvstore.transfer.metrics import TransferMetrics
from pdmesh.errors import CancelledRequestError, CorruptionError, DeadlineError, MeshError, TicketError
from pdmesh.transfers import (
    Direction,
    LiveTransfer,
    Outcome,
    TransferFailure,
    TransferReport,
    TransferTotal,
    TransportChoice,
    TransportFallback,
)

MAX_LIVE = 1024
MAX_FAILURES = 64
# Apart from failures, which many clients that leave would otherwise push out.
MAX_ABORTED = 16
MAX_CHOICES = 256
# Pairs of transports times reasons; a reason beyond them is counted as OTHER, so that time series stay few.
MAX_FALLBACKS = 64
MAX_REASON_CHARACTERS = 300
OTHER = "OTHER"

_ABORTED_REASONS = ("TRANSFER_ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")


def outcome_of(error: BaseException) -> Outcome:
    """How a transfer ended that raised `error`; LOST where it says neither that somebody gave up nor what was wrong."""
    reason = error.reason if isinstance(error, MeshError) else ""
    if reason == "LEASE_EXPIRED":
        return Outcome.LEASE_EXPIRED
    if isinstance(error, TicketError) or reason.startswith("TICKET_"):
        return Outcome.REFUSED
    if isinstance(error, CorruptionError):
        return Outcome.CORRUPTED
    if isinstance(error, asyncio.CancelledError | CancelledRequestError | DeadlineError) or reason in _ABORTED_REASONS:
        return Outcome.ABORTED
    return Outcome.LOST


class TransferEntry:
    """One transfer in the journal, from `begin` until it has ended.

    Attributes:
        state: What it waits for or does now, for a person; the owner sets it.
        has_moved: Its first byte has been told of.
        has_ended: It is no longer live.
    """

    def __init__(
        self,
        journal: "TransferJournal",
        direction: Direction,
        request_id: str,
        peer: str,
        transport: str,
        num_blocks: int,
        num_bytes: int,
        begun_at: float,
    ) -> None:
        self.state = "waiting"
        self.direction = direction
        self.request_id = request_id
        self.peer = peer
        self.transport = transport
        self.num_blocks = num_blocks
        self.num_bytes = num_bytes
        self.begun_at = begun_at
        self.has_moved = False
        self.has_ended = False
        self._journal = journal

    def first_byte(self) -> None:
        """The first byte is here, or gone; later calls do nothing."""
        self._journal.record_first_byte(self)

    def end(self, outcome: Outcome, num_bytes: int, num_parts: int, duration_s: float, reason: str = "") -> None:
        """It has ended, and moved so much; later calls do nothing, so whoever closes may say ABORTED in any case."""
        self._journal.record_end(self, outcome, num_bytes, num_parts, duration_s, reason)

    def fail(self, error: BaseException, num_bytes: int, num_parts: int, duration_s: float) -> None:
        """It has ended by `error`."""
        reason = f"{error.reason}: {error.message}" if isinstance(error, MeshError) else repr(error)
        self.end(outcome_of(error), num_bytes, num_parts, duration_s, reason)


class TransferJournal:
    """See the module.

    Args:
        registry: Gains the metrics; it takes those of one journal only.
        clock: Seconds, monotonic.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._metrics = TransferMetrics(registry)
        self._lock = threading.Lock()
        # Every entry that has not ended is counted, but not more than MAX_LIVE are listed, in order of their begin.
        self._num_live = dict.fromkeys(Direction, 0)
        self._live: dict[TransferEntry, None] = {}
        self._totals: dict[tuple[Direction, str], TransferTotal] = {}
        # With the clock's time of each, from which a report makes its age.
        self._failures: deque[tuple[float, TransferFailure]] = deque(maxlen=MAX_FAILURES)
        self._aborted: deque[tuple[float, TransferFailure]] = deque(maxlen=MAX_ABORTED)
        self._choices: OrderedDict[str, tuple[float, TransportChoice]] = OrderedDict()
        self._fallbacks: dict[tuple[str, str, str], tuple[float, TransportFallback]] = {}

    # What transfers say.

    def begin(
        self, direction: Direction, request_id: str, peer: str, transport: str, num_blocks: int, num_bytes: int
    ) -> TransferEntry:
        """A transfer is expected, or tried: on a receiver when it grants. The caller ends what this returns.

        Args:
            direction: As seen from here.
            request_id: The router's id of the request.
            peer: The worker or store at the other end: its id, or its address.
            transport: Over which it goes; one of few names, since it labels metrics.
            num_blocks: To move in all.
            num_bytes: Of these blocks.
        """
        entry = TransferEntry(
            self, direction, request_id, peer, transport, num_blocks, num_bytes, begun_at=self._clock()
        )
        with self._lock:
            self._num_live[direction] += 1
            if len(self._live) < MAX_LIVE:
                self._live[entry] = None
        self._metrics.live.labels(direction.value).inc()
        return entry

    def record_first_byte(self, entry: TransferEntry) -> None:
        """See TransferEntry.first_byte."""
        with self._lock:
            if entry.has_moved or entry.has_ended:
                return
            entry.has_moved = True
        waited_s = self._clock() - entry.begun_at
        self._metrics.queue_seconds.labels(entry.transport, entry.direction.value).observe(waited_s)

    def record_end(
        self, entry: TransferEntry, outcome: Outcome, num_bytes: int, num_parts: int, duration_s: float, reason: str
    ) -> None:
        """See TransferEntry.end."""
        failure = TransferFailure(
            direction=entry.direction,
            request_id=entry.request_id,
            peer=entry.peer,
            transport=entry.transport,
            outcome=outcome,
            reason=reason[:MAX_REASON_CHARACTERS],
            num_bytes=num_bytes,
            age_s=0.0,
        )
        kind = (entry.direction, entry.transport)
        with self._lock:
            if entry.has_ended:
                return
            entry.has_ended = True
            self._num_live[entry.direction] -= 1
            self._live.pop(entry, None)
            total = self._totals.get(kind) or TransferTotal(*kind)
            if outcome is Outcome.DONE:
                self._totals[kind] = replace(
                    total,
                    num_done=total.num_done + 1,
                    num_bytes=total.num_bytes + num_bytes,
                    num_parts=total.num_parts + num_parts,
                    duration_s=total.duration_s + duration_s,
                )
            elif outcome is Outcome.ABORTED:
                self._totals[kind] = replace(total, num_aborted=total.num_aborted + 1)
                self._aborted.append((self._clock(), failure))
            else:
                self._totals[kind] = replace(total, num_failed=total.num_failed + 1)
                self._failures.append((self._clock(), failure))
        self._metrics.count_end(entry.transport, entry.direction, outcome, num_bytes, duration_s)

    # What is said beside them.

    def note_choice(self, peer: str, transport: str, reason: str) -> None:
        """`transport` will be used with `peer`; `reason` says, for a person, why no better one. The last one counts."""
        choice = TransportChoice(peer, transport, reason[:MAX_REASON_CHARACTERS], 0.0)
        with self._lock:
            self._choices[peer] = (self._clock(), choice)
            self._choices.move_to_end(peer)
            if len(self._choices) > MAX_CHOICES:
                self._choices.popitem(last=False)

    def note_fallback(self, from_transport: str, to_transport: str, reason: str) -> None:
        """One transport gave way to the next; `reason` is an error's constant, such as RECEIVER_LOST."""
        with self._lock:
            if (from_transport, to_transport, reason) not in self._fallbacks and len(self._fallbacks) >= MAX_FALLBACKS:
                reason = OTHER
            key = (from_transport, to_transport, reason)
            count = self._fallbacks[key][1].count if key in self._fallbacks else 0
            self._fallbacks[key] = (self._clock(), TransportFallback(*key, count + 1, 0.0))
        self._metrics.fallbacks.labels(*key).inc()

    def note_fenced_write(self, transport: str) -> None:
        """A write was refused here that no entry stands for: its ticket is unknown, used or of a past attempt."""
        self._metrics.fenced_writes.labels(transport).inc()

    # What others ask.

    @property
    def num_live(self) -> int:
        """Transfers begun and not ended."""
        return sum(self._num_live.values())

    def transports_in_use(self) -> tuple[str, ...]:
        """Those of the last choice for any peer, sorted."""
        with self._lock:
            return tuple(sorted({choice.transport for _, choice in self._choices.values()}))

    def report(self, num_tickets: int = 0, num_leases: int = 0) -> TransferReport:
        """All of it as of now, beside the tickets and leases that the caller has counted."""
        with self._lock:
            now = self._clock()
            failures = sorted((*self._failures, *self._aborted), key=lambda dated: dated[0])
            return TransferReport(
                live=tuple(
                    LiveTransfer(
                        direction=entry.direction,
                        request_id=entry.request_id,
                        peer=entry.peer,
                        transport=entry.transport,
                        state=entry.state,
                        num_blocks=entry.num_blocks,
                        num_bytes=entry.num_bytes,
                        age_s=now - entry.begun_at,
                    )
                    for entry in self._live
                ),
                num_live=self.num_live,
                num_tickets=num_tickets,
                num_leases=num_leases,
                totals=tuple(self._totals.values()),
                choices=tuple(replace(c, age_s=now - at) for at, c in reversed(self._choices.values())),
                fallbacks=tuple(replace(f, age_s=now - at) for at, f in self._fallbacks.values()),
                failures=tuple(replace(f, age_s=now - at) for at, f in reversed(failures)),
            )
