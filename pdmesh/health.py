"""Asking a server whether it serves, by grpc.health.v1."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 5.0


async def is_serving(channel: grpc.aio.Channel, *, timeout_s: float = _TIMEOUT_S) -> bool:
    """Whether the process at the other end serves; False where none answers."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        # Its published stubs do not know its one method.
        response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)  # type: ignore[attr-defined]
    except grpc.aio.AioRpcError:
        return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
