"""The life of a gRPC server: bind, health, reflection, one translator of errors, drain, stop.

run(make_service) -> start -> (serving) -> SIGTERM or SIGINT -> drain -> close
                                                           second signal: close at once
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from pdmesh import status
from pdmesh.channels import SERVER_OPTIONS
from pdmesh.config import fail
from pdmesh.errors import ConfigError, InternalError, MeshError
from pdmesh.reflection import enable_reflection

log = logging.getLogger(__name__)

# Calls of these ask about a server rather than give it work.
_CONTROL_SERVICES = ("/grpc.", "/pdmesh.v1.Worker/", "/pdmesh.v1.Cluster/")


class Service(Protocol):
    """A process's whole work, as `run` drives it."""

    async def start(self) -> None:
        """Listens, loads, announces; returns when the service is up. Raises ConfigError."""
        ...

    async def drain_asked(self) -> None:
        """Returns when somebody asked this service, by RPC, to drain and leave. Raises MeshError if it cannot go on."""
        ...

    async def drain(self) -> None:
        """Takes nothing new and returns when the last request has ended."""
        ...

    async def close(self) -> None:
        """Frees everything, also what a failed `start` left; idempotent."""
        ...


def run(make_service: Callable[[], Service], *, drain_s: float, refuse: Callable[[str], None] = fail) -> None:
    """Runs a service until a signal ends it. Exit code 0 after a drain, 1 where it cannot go on, 2 for a ConfigError.

    `refuse` ends the process with the message of a ConfigError.
    The service is made inside the event loop: what gRPC makes binds to the loop that runs.
    """
    try:
        uvloop.run(_run(make_service, drain_s))
    except ConfigError as error:
        refuse(error.message)
    except MeshError as error:
        log.critical("cannot go on: %s", error.message, extra={"reason": error.reason})
        raise SystemExit(1) from error


async def _run(make_service: Callable[[], Service], drain_s: float) -> None:
    service = make_service()
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    starting = asyncio.create_task(service.start())
    stopping = asyncio.create_task(signals.get())
    asked = asyncio.create_task(service.drain_asked())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            await asyncio.wait({stopping, asked}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                await asked
            log.info("draining for up to %g s; signal again to stop at once", drain_s)
            draining, insisting = asyncio.create_task(service.drain()), asyncio.create_task(signals.get())
            await asyncio.wait({draining, insisting}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
            await _cancel(draining, insisting)
    finally:
        # Before closing: what waits on the service would learn of its end as of a failure, and nobody would ask.
        await _cancel(starting, stopping, asked)
        await service.close()


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class GrpcServer:
    """A grpc.aio server with health and reflection.

    Health is kept for "" (the process) and for each service; all begin NOT_SERVING.

    Args:
        host: Address to listen on.
        port: 0 takes a free one.
        advertise: Host under which others reach this process; the host itself unless given.
    """

    def __init__(self, host: str, port: int, advertise: str | None = None) -> None:
        self._host, self._port, self._advertise = host, port, advertise or host
        self._calls = _CallInterceptor()
        self._server = grpc.aio.server(interceptors=[self._calls], options=SERVER_OPTIONS)
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._service_names: list[str] = []
        self._serving = False

    def add(self, register: Callable[[Any, grpc.aio.Server], None], servicer: object, service_name: str) -> None:
        """Adds a service before `start`, e.g. (add_DecodeServicer_to_server, servicer, "pdmesh.v1.Decode")."""
        register(servicer, self._server)
        self._service_names.append(service_name)

    async def start(self) -> None:
        """Listens. Raises ConfigError where the address cannot be had."""
        enable_reflection(self._service_names, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self._port = self._server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {self._host}:{self._port}: is another process there? Choose another --port"
            ) from error
        await self._server.start()

    @property
    def address(self) -> str:
        """host:port under which others reach this server, once started."""
        return f"{self._advertise}:{self._port}"

    @property
    def num_active_calls(self) -> int:
        """Calls now running, those about the server itself (health, status) not counted."""
        return self._calls.num_active

    @property
    def serving(self) -> bool:
        return self._serving

    async def set_serving(self, serving: bool) -> None:
        """What health answers from now on, for the process and for every service."""
        self._serving = serving
        states = health_pb2.HealthCheckResponse
        await self._set_health(states.SERVING if serving else states.NOT_SERVING)

    async def _set_health(self, state: int) -> None:
        for name in ("", *self._service_names):
            await self._health.set(name, state)

    async def drained(self) -> None:
        """Returns when no call runs any more."""
        await self._calls.idle.wait()

    async def wait_stopped(self) -> None:
        """Returns once the server was stopped."""
        await self._server.wait_for_termination()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Stops listening; calls still running after `grace_s` are cancelled."""
        await self._server.stop(grace_s)


class _CallInterceptor(grpc.aio.ServerInterceptor):
    """Counts running calls and turns what a handler raises into its status: the one translator of errors."""

    def __init__(self) -> None:
        self.num_active = 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        counted = not method.startswith(_CONTROL_SERVICES)
        wrap = functools.partial(
            self._stream if handler.response_streaming else self._unary,
            _behaviour(handler),
            method,
            counted,
        )
        return _handler(handler, wrap)

    async def _unary(self, behaviour: Any, method: str, counted: bool, request: Any, context: Any) -> Any:
        async with self._guard(method, counted, context):
            return await behaviour(request, context)

    async def _stream(
        self, behaviour: Any, method: str, counted: bool, request: Any, context: Any
    ) -> AsyncIterator[Any]:
        async with self._guard(method, counted, context), contextlib.aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

    @contextlib.asynccontextmanager
    async def _guard(self, method: str, counted: bool, context: Any) -> AsyncIterator[None]:
        self.num_active += counted
        self.idle.clear() if self.num_active else None
        try:
            yield
        except MeshError as error:
            log.info("%s: %s", method, error.message, extra={"reason": error.reason, "stage": error.stage})
            await status.abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
            raise
        except Exception:
            log.exception("%s failed: a defect of ours", method)
            await status.abort(context, InternalError(f"{method} failed; the server's log says why"))
        finally:
            self.num_active -= counted
            if not self.num_active:
                self.idle.set()


def _behaviour(handler: Any) -> Any:
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def _handler(handler: Any, behaviour: Any) -> Any:
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
