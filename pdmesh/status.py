"""Errors as gRPC statuses and back: one table, used by every server and client.

A status carries one `google.rpc.ErrorInfo` (domain "pdmesh"): the reason, and as metadata whether it is retryable,
the stage, and the error's own details.
"""

from typing import NoReturn, Protocol

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from pdmesh import errors

DOMAIN = "pdmesh"

_CODES: dict[type[errors.MeshError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TicketError: grpc.StatusCode.PERMISSION_DENIED,
    errors.CorruptionError: grpc.StatusCode.DATA_LOSS,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CancelledRequestError: grpc.StatusCode.CANCELLED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}
_CLASSES = {code: cls for cls, code in _CODES.items()}


class Aborter(Protocol):
    """The part of a servicer context that this module needs."""

    async def abort_with_status(self, status: grpc.Status) -> NoReturn: ...


def to_status(error: errors.MeshError) -> grpc.Status:
    """The gRPC status of `error`, with rich details; an unlisted class counts as INTERNAL."""
    code = next((_CODES[cls] for cls in type(error).__mro__ if cls in _CODES), grpc.StatusCode.INTERNAL)
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={
            **error.details,
            "retryable": "true" if error.retryable else "false",
            "stage": error.stage,
        },
    )
    detail = any_pb2.Any()
    detail.Pack(info)
    return rpc_status.to_status(
        status_pb2.Status(code=code_pb2.Code.Value(code.name), message=error.message, details=[detail])
    )


async def abort(context: Aborter, error: errors.MeshError) -> NoReturn:
    """Ends the call with `error`'s status."""
    await context.abort_with_status(to_status(error))


def is_ours(error: grpc.RpcError) -> bool:
    """Whether `to_status` made the status, at the other end; if not, gRPC itself did, here or there."""
    return rpc_status.from_call(error) is not None  # type: ignore[arg-type]  # it takes any failed call


def from_rpc_error(error: grpc.RpcError, *, stage: str = "") -> errors.MeshError:
    """What a peer's status means here: the class by code, reason and stage from its details where it sent any."""
    code, message = error.code(), error.details() or ""
    cls = _CLASSES.get(code, errors.UnavailableError if code is grpc.StatusCode.UNKNOWN else errors.InternalError)
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it takes any failed call, its stubs do not
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            extra = dict(info.metadata)
            extra.pop("retryable", None)
            return cls(message, reason=info.reason, stage=extra.pop("stage", "") or stage, details=extra)
    return cls(message, stage=stage)
