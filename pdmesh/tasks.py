"""Ways to wait: one that cancellation may not cut short, for those who free what somebody else still uses; and two
things at once, of which one is the work and the other may only fail."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def settled(future: asyncio.Future[Any]) -> None:
    """Returns when `future` is done, however it ends. A cancellation meanwhile is raised only then.

    What the future failed with counts as seen: whoever waits like this has given up on its result.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if not future.cancelled():
        future.exception()
    if cancelled is not None:
        raise cancelled


async def beside(work: Coroutine[Any, Any, T], *watching: Coroutine[Any, Any, None]) -> T:
    """What `work` returns. `watching` runs beside it and is cancelled when it ends; what any of them raises ends all.

    Returns when all have ended.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(watch) for watch in watching]
            working = group.create_task(work)
            result = await working
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return result
