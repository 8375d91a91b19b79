"""Whether a supervisor was told to stop."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class StopAsked:
    """How often; 0 while nobody asked."""

    def __init__(self) -> None:
        self.count = 0
        self._asked = asyncio.Event()

    def ask(self, count: int) -> bool:
        """Told that somebody asked for the `count`th time. True where that is news: only who insists is heard again."""
        if count <= self.count:
            return False
        self.count = count
        self._asked.set()
        return True

    async def unless(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What `work` returns or raises; None, the work cancelled, where a stop is asked for first."""
        working, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait((working, asked), return_when=asyncio.FIRST_COMPLETED)
            return None if asked.done() else working.result()
        finally:
            for task in (working, asked):
                task.cancel()
            await asyncio.gather(working, asked, return_exceptions=True)
