"""Errors become statuses and come back the same."""

import grpc
import pytest

from pdmesh import errors
from pdmesh.status import from_rpc_error, to_status

CLASSES = [cls for cls in errors.MeshError.__subclasses__() if cls is not errors.ConfigError]


def as_seen_by_client(status: grpc.Status) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.trailing_metadata), details=status.details
    )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_round_trip(cls: type[errors.MeshError]) -> None:
    sent = cls("what to do", reason="A_REASON", stage="prefill", details={"limit": "8", "field": "n"})
    back = from_rpc_error(as_seen_by_client(to_status(sent)))
    assert type(back) is cls
    assert (back.message, back.reason, back.stage, back.details) == (
        "what to do", "A_REASON", "prefill", {"limit": "8", "field": "n"},
    )  # fmt: skip


def test_every_class_has_a_code_of_its_own() -> None:
    assert len({to_status(cls("")).code for cls in CLASSES}) == len(CLASSES)


def test_a_subclass_travels_as_its_parent() -> None:
    class QueueFullError(errors.OverloadedError):
        reason = "QUEUE_FULL"

    back = from_rpc_error(as_seen_by_client(to_status(QueueFullError("full"))))
    assert (type(back), back.reason) == (errors.OverloadedError, "QUEUE_FULL")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.UNKNOWN, errors.UnavailableError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.InternalError),
    ],
)
def test_a_status_without_details_goes_by_its_code(code: grpc.StatusCode, expected: type[errors.MeshError]) -> None:
    bare = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="as gRPC says it")
    error = from_rpc_error(bare, stage="decode")
    assert (type(error), error.message, error.stage) == (expected, "as gRPC says it", "decode")
