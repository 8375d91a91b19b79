"""Calls from a thread reach the loop: all of them, in order, and also those that nobody waited for."""

import asyncio
import threading
from functools import partial

import pytest

from engine.doorbell import Doorbell


async def test_all_calls_arrive_in_order() -> None:
    bell = Doorbell(asyncio.get_running_loop())
    seen: list[int] = []
    all_seen = asyncio.Event()

    def note(number: int) -> None:
        seen.append(number)
        if number == 19_999:
            all_seen.set()

    # More than a pipe holds, so that it is full for a while.
    def ring() -> None:
        for number in range(20_000):
            bell.call(partial(note, number))

    thread = threading.Thread(target=ring)
    thread.start()
    await asyncio.wait_for(all_seen.wait(), 10)
    thread.join()
    bell.close()
    assert seen == list(range(20_000))


async def test_a_loop_that_never_listens_blocks_nobody() -> None:
    bell = Doorbell(asyncio.get_running_loop())
    seen: list[int] = []
    # The loop does not get a turn: the pipe fills up.
    for number in range(100_000):
        bell.call(partial(seen.append, number))
    assert not seen
    bell.close()
    await asyncio.sleep(0)
    assert seen == list(range(100_000))


async def test_a_call_that_fails_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    bell = Doorbell(asyncio.get_running_loop())
    done = asyncio.Event()
    bell.call(lambda: 1 // 0)
    bell.call(done.set)
    await asyncio.wait_for(done.wait(), 10)
    assert "ZeroDivisionError" in caplog.text
    bell.close()
