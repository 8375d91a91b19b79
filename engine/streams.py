"""Outputs of one request on their way from the engine's thread to whoever awaits them on the event loop."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class EngineStream(Generic[T]):
    """Implements OutputStream and PrefillStream. Used on the event loop only; one task iterates it.

    Args:
        on_close: Called once, at the first `aclose`.
    """

    def __init__(self, on_close: Callable[[], None]) -> None:
        self._on_close = on_close
        self._events: deque[T] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._error: Exception | None = None
        self._closed = False

    def put(self, event: T) -> None:
        self._events.append(event)
        self._changed.set()

    def end(self, error: Exception | None = None) -> None:
        """No more events; the iteration ends after those put before, raising `error` if there is one."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._changed.set()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        while not self._events:
            if self._error is not None:
                # It may be raised in many streams: each traceback begins here.
                raise self._error.with_traceback(None)
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()

    async def aclose(self) -> None:
        """Ends the iteration at once, dropping what was not taken, and the request with it; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._events.clear()
        self._error = None
        self.end()
        self._on_close()
