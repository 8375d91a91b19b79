"""The states of a transfer, on both sides, apart from all I/O: `step(event, now)` gives the next state and what to do.

The receiving side, one for each ticket. Its blocks are reserved until Quiet:

    EXPECTED ──Redeem──▶ RECEIVING ──Finish, every byte verified──▶ DONE
        │                    │
        └── Fail, Abort, ────┴──▶ FAILED          Quiet: ended, and no write is under way. Blocks of a failed
            Tick past the lease                   transfer rest until then, however long a writer takes to stop.

The sending side, one for each request whose KV travels. A grant that fails is answered by the receiver with the next
one, for another transport, or by leaving:

    WAITING ──Granted──▶ OPENING ──Done──▶ SENDING ⇄ (Ready, Done) ──▶ FINISHING ──Done──▶ DONE
       ▲                     │                │                            │
       └── Failed: told to the receiver ──────┴────────────────────────────┤
                                                Abandon, Tick past the lease┴──▶ ABANDONED
                                                Release: ended, and nobody reads the blocks any more.

What executes the actions reports back by events; between an action and its event, anything else may happen. The model
check in tests/model explores exactly these functions.
"""

from bisect import bisect
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from pdmesh.errors import CorruptionError, MeshError, TicketError, UnavailableError
from pdmesh.hashing import BlockHash

# A side that has heard nothing of the other for so long gives the transfer up. The last resort: a peer that dies,
# stops or is cut off is noticed by its connection in less. What this catches is one whose process runs and hangs.
LEASE_S = 6.0
# Between two signs of life.
HEARTBEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a transfer failed: an error, as a value."""

    kind: type[MeshError]
    reason: str
    message: str

    @classmethod
    def of(cls, error: MeshError) -> "Failure":
        return cls(type(error), error.reason, error.message)

    def error(self) -> MeshError:
        return self.kind(self.message, reason=self.reason, stage="transfer")


# What both sides are told.


@dataclass(frozen=True, slots=True)
class Alive:
    """The peer gave a sign of life."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


# The receiving side.


@dataclass(frozen=True, slots=True)
class Redeem:
    """Somebody presents the ticket."""

    epoch: int
    request_id: str
    sender_incarnation: str


@dataclass(frozen=True, slots=True)
class BeginWrite:
    """A part is about to be written: bytes `begin` to `end` of all that the ticket covers.

    `block_hash` is the identity, at the sender, of the block in which it ends.
    """

    begin: int
    end: int
    block_hash: bytes


@dataclass(frozen=True, slots=True)
class EndWrite:
    """That write is over; `num_bytes` were written and verified, 0 if it failed."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The sender says that this was all."""

    num_parts: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Fail:
    """The writer is gone, or sent what cannot be right."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Abort:
    """The receiver wants no more."""

    failure: Failure


ReceivingEvent = Redeem | BeginWrite | EndWrite | Finish | Fail | Abort | Alive | Tick


@dataclass(frozen=True, slots=True)
class Accept:
    """The event was in order."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """It was not, and changed nothing."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class StopWriter:
    """Wake the writer, whatever it waits for: it is to give up."""


@dataclass(frozen=True, slots=True)
class Ended:
    """DONE or FAILED from now on; comes once."""


@dataclass(frozen=True, slots=True)
class Quiet:
    """The blocks are the receiver's alone, to commit or to free; comes once, last."""


_ACCEPT = Accept()

ReceivingAction = Accept | Refuse | StopWriter | Ended | Quiet


class TransferState(Enum):
    EXPECTED = "expected"
    RECEIVING = "receiving"
    DONE = "done"
    FAILED = "failed"


class Receiving(NamedTuple):
    """One ticket's transfer, on the side that reserved the blocks. A tuple: a new one is made for each part, twice.

    Attributes:
        block_hashes: Identity of each block that the ticket covers, in order.
        block_bytes: Size of each.
        expires_at: Of the lease.
        claims: Begins and ends of the byte ranges written or being written, sorted, disjoint, joined where they touch.
        num_writing: Writes under way.
        num_bytes: Written and verified.
    """

    request_id: str
    epoch: int
    sender_incarnation: str
    block_hashes: tuple[BlockHash, ...]
    block_bytes: int
    expires_at: float
    state: TransferState = TransferState.EXPECTED
    claims: tuple[int, ...] = ()
    num_writing: int = 0
    num_parts: int = 0
    num_bytes: int = 0
    failure: Failure | None = None

    @property
    def total_bytes(self) -> int:
        return len(self.block_hashes) * self.block_bytes

    @property
    def ended(self) -> bool:
        return self.state in (TransferState.DONE, TransferState.FAILED)

    @property
    def quiet(self) -> bool:
        return self.ended and not self.num_writing

    def step(self, event: ReceivingEvent, now: float) -> "tuple[Receiving, tuple[ReceivingAction, ...]]":
        """What `event` makes of this, and what is to be done about it."""
        match event:
            case Redeem():
                return self._redeem(event, now)
            case BeginWrite():
                return self._begin_write(event, now)
            case EndWrite():
                written = self._replace(
                    num_writing=self.num_writing - 1,
                    num_bytes=self.num_bytes + event.num_bytes,
                    num_parts=self.num_parts + bool(event.num_bytes),
                )
                return written, (Quiet(),) if written.quiet else ()
            case Finish():
                return self._finish(event)
            case Fail():
                return self._end(event.failure, stop_writer=False)
            case Abort():
                return self._end(event.failure, stop_writer=True)
            case Alive():
                return self._replace(expires_at=now + LEASE_S), ()
            case Tick():
                if now < self.expires_at:
                    return self, ()
                return self._end(_expired("the sender", LEASE_S), stop_writer=True)

    def _redeem(self, event: Redeem, now: float) -> "tuple[Receiving, tuple[ReceivingAction, ...]]":
        if self.epoch != event.epoch:
            return self, _refused("TICKET_EPOCH", f"this ticket is of epoch {self.epoch}, not {event.epoch}")
        if (self.request_id, self.sender_incarnation) != (event.request_id, event.sender_incarnation):
            return self, _refused("TICKET_SENDER", "this ticket is somebody else's")
        if self.state is not TransferState.EXPECTED:
            return self, _refused("TICKET_USED", "this ticket was used or revoked")
        return self._replace(state=TransferState.RECEIVING, expires_at=now + LEASE_S), (_ACCEPT,)

    def _begin_write(self, event: BeginWrite, now: float) -> "tuple[Receiving, tuple[ReceivingAction, ...]]":
        if self.state is not TransferState.RECEIVING:
            return self, _refused("TICKET_REVOKED", "this ticket was revoked")
        begin, end = event.begin, event.end
        if not 0 <= begin < end <= self.total_bytes:
            return self, _corrupt(
                "KV_OUT_OF_RANGE", f"bytes {begin} to {end} lie outside the {self.total_bytes} that this ticket covers"
            )
        if event.block_hash != self.block_hashes[(end - 1) // self.block_bytes]:
            return self, _corrupt("KV_WRONG_BLOCK", f"block {(end - 1) // self.block_bytes} holds other tokens")
        place = bisect(self.claims, begin)
        # An odd place is inside a range; so is the end, if another range begins before it.
        if place % 2 or (place < len(self.claims) and self.claims[place] < end):
            return self, _corrupt("KV_DUPLICATED", f"bytes {begin} to {end} came twice")
        head, tail = self.claims[:place], self.claims[place:]
        middle = (begin, end)
        if tail and tail[0] == end:
            middle, tail = (begin, tail[1]), tail[2:]
        if head and head[-1] == begin:
            middle, head = (head[-2], middle[1]), head[:-2]
        claims = (*head, *middle, *tail)
        claimed = self._replace(claims=claims, num_writing=self.num_writing + 1, expires_at=now + LEASE_S)
        return claimed, (_ACCEPT,)

    def _finish(self, event: Finish) -> "tuple[Receiving, tuple[ReceivingAction, ...]]":
        if self.state is not TransferState.RECEIVING:
            return self, _refused("TICKET_REVOKED", "this ticket was revoked")
        if self.num_bytes != self.total_bytes or (event.num_parts, event.num_bytes) != (self.num_parts, self.num_bytes):
            return self, _corrupt(
                "KV_INCOMPLETE",
                f"{self.num_bytes} of {self.total_bytes} bytes arrived, in {self.num_parts} parts; "
                f"the sender speaks of {event.num_bytes} bytes in {event.num_parts} parts",
            )
        assert not self.num_writing, "every byte is verified and yet one is being written"
        return self._replace(state=TransferState.DONE), (_ACCEPT, Ended(), Quiet())

    def _end(self, failure: Failure, *, stop_writer: bool) -> "tuple[Receiving, tuple[ReceivingAction, ...]]":
        if self.ended:
            return self, ()
        actions: list[ReceivingAction] = [Ended()]
        if stop_writer and self.state is TransferState.RECEIVING:
            actions.append(StopWriter())
        ended = self._replace(state=TransferState.FAILED, failure=failure)
        return ended, (*actions, Quiet()) if ended.quiet else tuple(actions)

    def check_invariants(self) -> None:
        """Raises AssertionError where the books do not add up; callable at any time."""
        bounds = self.claims
        assert len(bounds) % 2 == 0
        assert bounds == tuple(sorted(set(bounds))), "ranges are disjoint and joined where they touch"
        assert 0 <= self.num_bytes <= sum(bounds[1::2]) - sum(bounds[::2]) <= self.total_bytes
        assert self.num_writing >= 0
        assert (self.failure is not None) == (self.state is TransferState.FAILED)
        if self.state is TransferState.DONE:
            assert (self.num_bytes, self.num_writing) == (self.total_bytes, 0)


# The sending side.


@dataclass(frozen=True, slots=True)
class Granted:
    """Leave to write came; the receiver has given up what it granted before. Grants are numbered 0, 1, …"""

    number: int


@dataclass(frozen=True, slots=True)
class Ready:
    """So many blocks are computed, of those that travel; with `last` there will be no more."""

    num_blocks: int
    last: bool


@dataclass(frozen=True, slots=True)
class Done:
    """What was begun last has succeeded."""


@dataclass(frozen=True, slots=True)
class Failed:
    """What was begun last has failed, or was closed before it was done."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Abandon:
    """Nobody wants the blocks any more."""

    failure: Failure


SendingEvent = Granted | Ready | Done | Failed | Abandon | Alive | Tick


@dataclass(frozen=True, slots=True)
class Open:
    """Present the ticket of this grant."""

    grant: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send blocks, by their place among those that travel."""

    first: int
    end: int


@dataclass(frozen=True, slots=True)
class FinishSending:
    """Have the receiver confirm all of it."""


@dataclass(frozen=True, slots=True)
class Close:
    """End what is under way with the current grant, if anything is; Done or Failed comes when nobody reads blocks."""


@dataclass(frozen=True, slots=True)
class TellFailed:
    """The receiver is to know that this grant came to nothing."""

    grant: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Release:
    """Nobody reads the blocks any more; comes once, last."""


SendingAction = Open | Send | FinishSending | Close | TellFailed | Release


class SendingState(Enum):
    WAITING = "waiting for a grant"
    OPENING = "opening"
    SENDING = "sending"
    FINISHING = "finishing"
    DONE = "done"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class Sending:
    """The KV of one request on its way, on the side that has the blocks.

    Attributes:
        expires_at: Of the receiver's lease on the blocks.
        grant: The last one; -1 before the first.
        num_ready: Blocks that may be sent.
        all_ready: There will be no more.
        num_sent: Under the current grant, those under way included.
        busy: An Open, Send, FinishSending or Close is under way: blocks may be read.
        next_grant: One that came while the one before was busy.
        failure: Why it was abandoned.
    """

    expires_at: float
    state: SendingState = SendingState.WAITING
    grant: int = -1
    num_ready: int = 0
    all_ready: bool = False
    num_sent: int = 0
    busy: bool = False
    next_grant: int | None = None
    failure: Failure | None = field(default=None)

    @property
    def ended(self) -> bool:
        return self.state in (SendingState.DONE, SendingState.ABANDONED)

    @property
    def goes_on(self) -> bool:
        """If what is under way succeeds, more follows under the same grant."""
        return self.state in (SendingState.OPENING, SendingState.SENDING) and self.next_grant is None

    def step(self, event: SendingEvent, now: float) -> "tuple[Sending, tuple[SendingAction, ...]]":
        """What `event` makes of this, and what is to be done about it."""
        if isinstance(event, Done | Failed):
            return self._came_back(event)
        if self.ended:
            return self, ()
        match event:
            case Granted():
                return self._granted(event, replace(self, expires_at=now + LEASE_S))
            case Ready():
                return replace(self, num_ready=event.num_blocks, all_ready=event.last)._go_on()
            case Alive():
                return replace(self, expires_at=now + LEASE_S), ()
            case Tick() if now >= self.expires_at:
                return self._abandon(_expired("the receiver", LEASE_S))
            case Abandon():
                return self._abandon(event.failure)
        return self, ()

    def _granted(self, event: Granted, alive: "Sending") -> "tuple[Sending, tuple[SendingAction, ...]]":
        if event.number <= max(self.grant, -1 if self.next_grant is None else self.next_grant):
            return alive, ()
        if self.state is SendingState.WAITING:
            return alive._open(event.number)
        closing = replace(alive, next_grant=event.number, busy=True)
        return closing, (Close(),) if self.next_grant is None else ()

    def _open(self, grant: int) -> "tuple[Sending, tuple[SendingAction, ...]]":
        opening = replace(self, state=SendingState.OPENING, grant=grant, next_grant=None, num_sent=0, busy=True)
        return opening, (Open(grant),)

    def _go_on(self) -> "tuple[Sending, tuple[SendingAction, ...]]":
        """Sends what is ready, or finishes, where nothing is under way."""
        if self.busy or self.state is not SendingState.SENDING:
            return self, ()
        if self.num_sent < self.num_ready:
            return replace(self, num_sent=self.num_ready, busy=True), (Send(self.num_sent, self.num_ready),)
        if self.all_ready:
            return replace(self, state=SendingState.FINISHING, busy=True), (FinishSending(),)
        return self, ()

    def _came_back(self, event: Done | Failed) -> "tuple[Sending, tuple[SendingAction, ...]]":
        assert self.busy, "nothing was under way"
        idle = replace(self, busy=False)
        if self.ended:
            return idle, (Release(),)
        if self.next_grant is not None:
            return idle._open(self.next_grant)
        if isinstance(event, Failed):
            return replace(idle, state=SendingState.WAITING), (TellFailed(self.grant, event.failure),)
        if self.state is SendingState.FINISHING:
            return replace(idle, state=SendingState.DONE), (Release(),)
        return replace(idle, state=SendingState.SENDING)._go_on()

    def _abandon(self, failure: Failure) -> "tuple[Sending, tuple[SendingAction, ...]]":
        if self.state is SendingState.WAITING:
            return replace(self, state=SendingState.ABANDONED, failure=failure), (Release(),)
        return replace(self, state=SendingState.ABANDONED, failure=failure, busy=True), (Close(),)


def _refused(reason: str, message: str) -> tuple[Refuse]:
    return (Refuse(Failure(TicketError, reason, message)),)


def _corrupt(reason: str, message: str) -> tuple[Refuse]:
    return (Refuse(Failure(CorruptionError, reason, message)),)


def _expired(who: str, after_s: float) -> Failure:
    return Failure(UnavailableError, "LEASE_EXPIRED", f"{who} gave no sign of life for {after_s:g} s")
