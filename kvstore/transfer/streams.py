"""The streams beside which KV travels, as all services speak them: heartbeats, leases, and one writer at a time."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar, cast

import grpc

from kvstore.transfer.states import HEARTBEAT_S, LEASE_S
from pdmesh import status
from pdmesh.errors import MeshError, UnavailableError
from pdmesh.tasks import settled

log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

# In which a peer of whom nothing more is wanted ends its stream by itself; what it still says changes nothing.
END_TIMEOUT_S = 2.0
# A receiver that has all acknowledges it over the transport and then ends its stream: either may arrive first.
_ACKNOWLEDGE_S = 1.0


class ClientStream(Generic[RequestT, ResponseT]):
    """A bidirectional call, on the side that made it. End it with `end` or `aclose`.

    A read or write of gRPC that is cancelled ends the whole call. So both run in tasks of their own, and whoever waits
    for them here may be cancelled.

    Args:
        call: Just made.
        peer: Who is called, for messages.
        heartbeat: What gives a sign of life.
        stage: Of errors.
    """

    def __init__(
        self, call: grpc.aio.StreamStreamCall[RequestT, ResponseT], peer: str, heartbeat: RequestT, stage: str
    ) -> None:
        self._call = call
        self._peer = peer
        self._heartbeat = heartbeat
        self._stage = stage
        # gRPC takes one message at a time.
        self._writing = asyncio.Lock()
        # What came; last of all, why there is no more.
        self._came: asyncio.Queue[ResponseT | MeshError] = asyncio.Queue()
        self._ended_by: MeshError | None = None
        self._lost = False
        self._reading = asyncio.create_task(self._read())

    async def write(self, request: RequestT) -> None:
        """Raises MeshError: why the peer has ended the stream."""
        writing = asyncio.ensure_future(self._write(request))
        # Whoever waits for it may be cancelled, and then nobody asks how it went.
        writing.add_done_callback(_seen)
        await asyncio.shield(writing)

    async def beat(self) -> None:
        """Gives signs of life until cancelled."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self.write(self._heartbeat)

    async def responses(self) -> AsyncIterator[ResponseT]:
        """All of them. Raises MeshError: why there are no more, or that none came for too long, from one that hangs."""
        while True:
            try:
                async with asyncio.timeout(LEASE_S):
                    came = await self._came.get()
            except TimeoutError as error:
                raise UnavailableError(
                    f"{self._peer} gave no sign of life for {LEASE_S:g} s", reason="LEASE_EXPIRED", stage=self._stage
                ) from error
            if isinstance(came, MeshError):
                raise came
            yield came

    async def end(self) -> bool:
        """Lets the peer come to its end by itself, if it does so soon. Returns whether it is known that it has."""
        in_time = True
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                try:
                    async with self._writing:
                        await self._call.done_writing()
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                    log.debug("a stream that was no longer needed ended with %r", error)
                await asyncio.wait([self._reading])
        except TimeoutError:
            in_time = False
        await self.aclose()
        return in_time and not self._lost

    async def aclose(self) -> None:
        """Ends it at once. Idempotent."""
        self._call.cancel()
        await settled(self._reading)

    async def _write(self, request: RequestT) -> None:
        async with self._writing:
            try:
                await self._call.write(request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                # Its end came first; the reader knows why.
                await asyncio.wait([self._reading])
                assert self._ended_by is not None
                raise self._ended_by from error

    async def _read(self) -> None:
        self._ended_by = UnavailableError(f"{self._peer} ended the stream", stage=self._stage)
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                self._came.put_nowait(cast(ResponseT, response))
        except grpc.aio.AioRpcError as error:
            by_grpc = None if status.is_ours(error) else error.code()
            self._lost = by_grpc is grpc.StatusCode.UNAVAILABLE
            # A write that comes after the peer's end hides what that was: https://github.com/grpc/grpc/issues/36066
            if by_grpc is not grpc.StatusCode.INTERNAL:
                self._ended_by = status.from_rpc_error(error, stage=self._stage)
        finally:
            self._came.put_nowait(self._ended_by)


def _seen(writing: "asyncio.Future[None]") -> None:
    if not writing.cancelled():
        writing.exception()


async def responses_of(
    work: Callable[[Callable[[ResponseT], None]], Awaitable[None]], heartbeat: ResponseT
) -> AsyncGenerator[ResponseT, None]:
    """What `work` emits, with signs of life between, on the side that is called.

    Raises what `work` raises. Closing it cancels `work` and waits for its end.
    """
    queue: asyncio.Queue[ResponseT | None] = asyncio.Queue()
    working = asyncio.ensure_future(work(queue.put_nowait))
    working.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    response = await queue.get()
            except TimeoutError:
                yield heartbeat
                continue
            if response is None:
                break
            yield response
        await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def acknowledged(shipped: Awaitable[object], error: MeshError) -> None:
    """Returns when `shipped` has, on the side that is called, once the caller has ended its stream.

    Raises `error` where that takes long: then the caller has left without having all.
    """
    try:
        async with asyncio.timeout(_ACKNOWLEDGE_S):
            await shipped
    except TimeoutError:
        raise error from None
