"""KV transfers as one process knows them: what a worker reports and a person sees.

Ages and durations are seconds, counted back from the moment of the report: no clock time crosses a process border.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pdmesh.types import Role, role_from_pb
from pdmesh.v1 import cluster_pb2 as pb


class Direction(Enum):
    """Which way the bytes go, seen from the process that reports: FETCHING is from a tier or a shared store."""

    SENDING = "sending"
    RECEIVING = "receiving"
    FETCHING = "fetching"


class Outcome(Enum):
    """How a transfer ended; see cluster.proto."""

    DONE = "done"
    ABORTED = "aborted"
    LOST = "lost"
    LEASE_EXPIRED = "lease_expired"
    CORRUPTED = "corrupted"
    REFUSED = "refused"


_DIRECTIONS = {
    Direction.SENDING: pb.TRANSFER_DIRECTION_SENDING,
    Direction.RECEIVING: pb.TRANSFER_DIRECTION_RECEIVING,
    Direction.FETCHING: pb.TRANSFER_DIRECTION_FETCHING,
}
_OUTCOMES = {
    Outcome.DONE: pb.TRANSFER_OUTCOME_DONE,
    Outcome.ABORTED: pb.TRANSFER_OUTCOME_ABORTED,
    Outcome.LOST: pb.TRANSFER_OUTCOME_LOST,
    Outcome.LEASE_EXPIRED: pb.TRANSFER_OUTCOME_LEASE_EXPIRED,
    Outcome.CORRUPTED: pb.TRANSFER_OUTCOME_CORRUPTED,
    Outcome.REFUSED: pb.TRANSFER_OUTCOME_REFUSED,
}
_DIRECTIONS_BACK = {v: k for k, v in _DIRECTIONS.items()}
_OUTCOMES_BACK = {v: k for k, v in _OUTCOMES.items()}


@dataclass(frozen=True, slots=True)
class LiveTransfer:
    """A transfer that has begun and not ended; `num_bytes` is all that it is to move."""

    direction: Direction
    request_id: str
    peer: str
    transport: str
    state: str
    num_blocks: int
    num_bytes: int
    age_s: float

    @classmethod
    def from_pb(cls, message: pb.LiveTransfer) -> LiveTransfer:
        return cls(
            direction=_DIRECTIONS_BACK[message.direction],
            request_id=message.request_id,
            peer=message.peer,
            transport=message.transport,
            state=message.state,
            num_blocks=message.num_blocks,
            num_bytes=message.num_bytes,
            age_s=message.age_s,
        )

    def to_pb(self) -> pb.LiveTransfer:
        return pb.LiveTransfer(
            direction=_DIRECTIONS[self.direction],
            request_id=self.request_id,
            peer=self.peer,
            transport=self.transport,
            state=self.state,
            num_blocks=self.num_blocks,
            num_bytes=self.num_bytes,
            age_s=self.age_s,
        )


@dataclass(frozen=True, slots=True)
class TransferTotal:
    """Every ended transfer of one direction over one transport; bytes, parts and seconds are of those that are done."""

    direction: Direction
    transport: str
    num_done: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    num_parts: int = 0
    duration_s: float = 0.0

    @classmethod
    def from_pb(cls, message: pb.TransferTotal) -> TransferTotal:
        return cls(
            direction=_DIRECTIONS_BACK[message.direction],
            transport=message.transport,
            num_done=message.num_done,
            num_aborted=message.num_aborted,
            num_failed=message.num_failed,
            num_bytes=message.num_bytes,
            num_parts=message.num_parts,
            duration_s=message.duration_s,
        )

    def to_pb(self) -> pb.TransferTotal:
        return pb.TransferTotal(
            direction=_DIRECTIONS[self.direction],
            transport=self.transport,
            num_done=self.num_done,
            num_aborted=self.num_aborted,
            num_failed=self.num_failed,
            num_bytes=self.num_bytes,
            num_parts=self.num_parts,
            duration_s=self.duration_s,
        )


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """Which transport was last chosen for a peer, and why no better one."""

    peer: str
    transport: str
    reason: str
    age_s: float

    @classmethod
    def from_pb(cls, message: pb.TransportChoice) -> TransportChoice:
        return cls(message.peer, message.transport, message.reason, message.age_s)

    def to_pb(self) -> pb.TransportChoice:
        return pb.TransportChoice(peer=self.peer, transport=self.transport, reason=self.reason, age_s=self.age_s)


@dataclass(frozen=True, slots=True)
class TransportFallback:
    """How often one transport gave way to another for one reason; `age_s` since the last time."""

    from_transport: str
    to_transport: str
    reason: str
    count: int
    age_s: float

    @classmethod
    def from_pb(cls, message: pb.TransportFallback) -> TransportFallback:
        return cls(message.from_transport, message.to_transport, message.reason, message.count, message.age_s)

    def to_pb(self) -> pb.TransportFallback:
        return pb.TransportFallback(
            from_transport=self.from_transport,
            to_transport=self.to_transport,
            reason=self.reason,
            count=self.count,
            age_s=self.age_s,
        )


@dataclass(frozen=True, slots=True)
class TransferFailure:
    """A transfer that ended other than DONE; `num_bytes` were moved before."""

    direction: Direction
    request_id: str
    peer: str
    transport: str
    outcome: Outcome
    reason: str
    num_bytes: int
    age_s: float

    @classmethod
    def from_pb(cls, message: pb.TransferFailure) -> TransferFailure:
        return cls(
            direction=_DIRECTIONS_BACK[message.direction],
            request_id=message.request_id,
            peer=message.peer,
            transport=message.transport,
            outcome=_OUTCOMES_BACK[message.outcome],
            reason=message.reason,
            num_bytes=message.num_bytes,
            age_s=message.age_s,
        )

    def to_pb(self) -> pb.TransferFailure:
        return pb.TransferFailure(
            direction=_DIRECTIONS[self.direction],
            request_id=self.request_id,
            peer=self.peer,
            transport=self.transport,
            outcome=_OUTCOMES[self.outcome],
            reason=self.reason,
            num_bytes=self.num_bytes,
            age_s=self.age_s,
        )


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What one process knows of its transfers; see cluster.proto for order and bounds."""

    live: tuple[LiveTransfer, ...] = ()
    num_live: int = 0
    num_tickets: int = 0
    num_leases: int = 0
    totals: tuple[TransferTotal, ...] = ()
    choices: tuple[TransportChoice, ...] = ()
    fallbacks: tuple[TransportFallback, ...] = ()
    failures: tuple[TransferFailure, ...] = ()

    @classmethod
    def from_pb(cls, message: pb.TransferReport) -> TransferReport:
        """Raises KeyError for a direction or outcome that this version does not know."""
        return cls(
            live=tuple(map(LiveTransfer.from_pb, message.live)),
            num_live=message.num_live,
            num_tickets=message.num_tickets,
            num_leases=message.num_leases,
            totals=tuple(map(TransferTotal.from_pb, message.totals)),
            choices=tuple(map(TransportChoice.from_pb, message.choices)),
            fallbacks=tuple(map(TransportFallback.from_pb, message.fallbacks)),
            failures=tuple(map(TransferFailure.from_pb, message.failures)),
        )

    def to_pb(self) -> pb.TransferReport:
        return pb.TransferReport(
            live=[entry.to_pb() for entry in self.live],
            num_live=self.num_live,
            num_tickets=self.num_tickets,
            num_leases=self.num_leases,
            totals=[entry.to_pb() for entry in self.totals],
            choices=[entry.to_pb() for entry in self.choices],
            fallbacks=[entry.to_pb() for entry in self.fallbacks],
            failures=[entry.to_pb() for entry in self.failures],
        )


@dataclass(frozen=True, slots=True)
class WorkerTransfers:
    """What one worker answered; `report` is None where it did not, and `error` says why."""

    worker_id: str
    role: Role
    address: str
    report: TransferReport | None
    error: str

    @classmethod
    def from_pb(cls, message: pb.WorkerTransfers) -> WorkerTransfers:
        """Raises KeyError for an enum value that this version does not know."""
        return cls(
            worker_id=message.worker_id,
            role=role_from_pb(message.role),
            address=message.address,
            report=TransferReport.from_pb(message.report) if message.HasField("report") else None,
            error=message.error,
        )
