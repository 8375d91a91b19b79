"""Waiting for two things at once, and waiting in spite of cancellation."""

import asyncio

import pytest

from pdmesh.tasks import beside, settled


async def forever(ended: list[str], name: str) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append(name)


async def value(result: int) -> int:
    await asyncio.sleep(0)
    return result


async def fail(error: Exception) -> None:
    await asyncio.sleep(0)
    raise error


async def test_work_ends_what_watches_beside_it() -> None:
    ended: list[str] = []
    assert await beside(value(7), forever(ended, "a"), forever(ended, "b")) == 7
    assert sorted(ended) == ["a", "b"]


async def test_a_watch_that_fails_ends_the_work() -> None:
    ended: list[str] = []
    with pytest.raises(ValueError, match="left"):
        await beside(forever(ended, "work"), forever(ended, "a"), fail(ValueError("left")))
    assert sorted(ended) == ["a", "work"]


async def test_work_that_fails_raises_its_own_error() -> None:
    ended: list[str] = []
    with pytest.raises(KeyError):
        await beside(fail(KeyError("x")), forever(ended, "a"))
    assert ended == ["a"]


async def test_cancelling_cancels_all() -> None:
    ended: list[str] = []
    both = asyncio.create_task(beside(forever(ended, "work"), forever(ended, "a")))
    await asyncio.sleep(0.01)
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both
    assert sorted(ended) == ["a", "work"]


async def test_settled_outlasts_a_cancellation() -> None:
    going_on = asyncio.Event()
    work = asyncio.create_task(going_on.wait())
    waiting = asyncio.create_task(settled(work))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0.01)
    assert not waiting.done()
    going_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.result() is True
