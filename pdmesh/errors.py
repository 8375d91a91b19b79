"""Every error that pdmesh raises on purpose.

    MeshError
    ├── InvalidRequestError      the request can never succeed as it is
    ├── NotFoundError            it names a model or worker that is not here
    ├── OverloadedError          full: another worker, or later
    ├── UnavailableError         nobody can serve it now, or whoever did was lost
    ├── PreconditionError        sent to a past incarnation, or to a worker that cannot pair
    ├── TicketError              a KV transfer without leave: unknown, used or fenced ticket
    ├── CorruptionError          bytes that fail their checksum or shape
    ├── DeadlineError            the request's time is up
    ├── CancelledRequestError    whoever asked has left
    ├── InternalError            a defect of ours
    └── ConfigError              a flag, variable or model file that a person must mend; ends a process, not a call

An error carries a constant `reason`, whether trying again can help (`retryable`) and the `stage` of the request's
life in which it arose. `pdmesh.status` turns errors into gRPC statuses and back; nothing else does.
"""

from typing import ClassVar


class MeshError(Exception):
    """Base of the tree.

    Args:
        message: What went wrong and what to do, for a person.
        reason: Constant for programs, UPPER_SNAKE_CASE; the class's own unless given.
        stage: "admission", "routing", "queue", "prefill", "transfer", "decode"; empty where none applies.
        details: What the reason needs, e.g. {"limit": "8192"}.
    """

    reason: str = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        stage: str = "",
        details: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if reason is not None:
            self.reason = reason
        self.stage = stage
        self.details = details or {}


class InvalidRequestError(MeshError):
    reason = "INVALID_REQUEST"


class NotFoundError(MeshError):
    reason = "NOT_FOUND"


class OverloadedError(MeshError):
    reason = "OVERLOADED"
    retryable = True


# Of a worker of several ranks, one of which has ended: the others are about to.
RANK_LOST = "RANK_LOST"


class UnavailableError(MeshError):
    reason = "UNAVAILABLE"
    retryable = True

    @property
    def peer_is_gone(self) -> bool:
        """Nobody was there, or whoever said this is about to end: it is of no use to ask again."""
        return self.reason in (UnavailableError.reason, RANK_LOST)


class PreconditionError(MeshError):
    reason = "PRECONDITION_FAILED"


class TicketError(MeshError):
    reason = "TICKET_REFUSED"


class CorruptionError(MeshError):
    reason = "KV_CORRUPTED"
    retryable = True


class DeadlineError(MeshError):
    reason = "DEADLINE_EXCEEDED"


class CancelledRequestError(MeshError):
    reason = "CANCELLED"


class InternalError(MeshError):
    reason = "INTERNAL"


class ConfigError(MeshError):
    reason = "CONFIG"
