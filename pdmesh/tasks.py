"""Waiting that cancellation may not cut short, for those who free what somebody else still uses."""

import asyncio
from typing import Any


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
