"""Calls from a thread to an event loop, without giving the interpreter away.

`call_soon_threadsafe` wakes the loop by a system call during which another thread may take the interpreter. The loop
does, for as long as it has work, and the thread that only meant to pass something on waits: 0.4 ms in each step of 32
requests. Here the bell is rung with the interpreter held; when the loop has woken up, the thread is where it wanted to
be, computing.
"""

import asyncio
import ctypes
import os
from collections import deque
from collections.abc import Callable

# Of this process. Unlike CDLL's functions, PyDLL's keep the interpreter.
_write = ctypes.PyDLL(None).write
_write.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
_write.restype = ctypes.c_ssize_t


class Doorbell:
    """Made and closed on the loop that it calls; `call` is for other threads, and not after `close`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], object]] = deque()
        self._inside, self._outside = os.pipe()
        for end in (self._inside, self._outside):
            os.set_blocking(end, False)
        loop.add_reader(self._inside, self._answer)

    def call(self, callback: Callable[[], object]) -> None:
        """Has the loop call `callback` soon, in order. Where the loop is closed, nobody does."""
        self._calls.append(callback)
        # Full is as good as rung.
        _write(self._outside, b"\0", 1)

    def close(self) -> None:
        """The loop still gets what was called before."""
        self._answer()
        self._loop.remove_reader(self._inside)
        os.close(self._inside)
        os.close(self._outside)

    def _answer(self) -> None:
        # First the bell, then the calls: one that comes in between rings again.
        while self._rung():
            pass
        while self._calls:
            self._loop.call_soon(self._calls.popleft())

    def _rung(self) -> bool:
        try:
            return len(os.read(self._inside, 4096)) == 4096
        except BlockingIOError:
            return False
