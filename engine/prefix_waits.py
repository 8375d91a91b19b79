"""Requests that wait for a running one to fill a block which they have in common with it.

Requests with one prefix that arrive together (completions of one prompt, a burst behind one system prompt) would each
compute it, since a block is found only once it is committed. Instead, one computes and the others wait until the
block that they lack is committed, or its request is gone; then they look again.
"""

from engine.request import Request
from pdmesh.hashing import BlockHash


class PrefixWaits:
    """Per block being filled: who fills it, and who waits. Waiting requests hold no blocks and no seat."""

    def __init__(self) -> None:
        self._waiting: dict[BlockHash, list[Request]] = {}

    def __len__(self) -> int:
        """How many requests wait."""
        return sum(map(len, self._waiting.values()))

    def announce(self, request: Request, block_hash: BlockHash) -> None:
        """`request` is running and fills this block next. Where another does so already, that one stays the one."""
        if block_hash not in self._waiting:
            self._waiting[block_hash] = []
            request.computing = block_hash

    def settle(self, request: Request) -> list[Request]:
        """`request` has filled the block that it announced, or never will: returns who waited for it."""
        if request.computing is None:
            return []
        woken = self._waiting.pop(request.computing)
        request.computing = None
        for waiter in woken:
            waiter.awaiting = None
        return woken

    def wait(self, request: Request, block_hash: BlockHash) -> bool:
        """Lets `request` wait for this block; False if nobody is filling it."""
        waiting = self._waiting.get(block_hash)
        if waiting is None:
            return False
        waiting.append(request)
        request.awaiting = block_hash
        return True

    def leave(self, request: Request) -> None:
        """`request` waits no more."""
        assert request.awaiting is not None, "it does not wait"
        self._waiting[request.awaiting].remove(request)
        request.awaiting = None
