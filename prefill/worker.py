"""One prompt's life on a prefill worker.

1. It queues in the engine; no memory is held for it anywhere.
2. First scheduled: the decode worker is told (`Started`), and answers in its time with a grant.
3. Each step computes a chunk. Blocks that are full and not held by the decode worker become ready; once the
   grant is here they are sent, while the next chunk computes.
4. The last step samples the first token, passed on at once (`FirstToken`). If decode has no room yet, the KV
   stays here, in the request's own blocks, until the grant comes or the stream ends.
5. The rest is sent, the receiver acknowledges all of it (`Complete`).
6. However it ends, the sender is closed and the blocks go back, in one `finally`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from engine.api import Engine, EngineRequest, TokenOutput
from kvstore.transfer.base import Grant, TransferStats
from kvstore.transfer.senders import KVSenders
from pdmesh.tasks import settled
from pdmesh.types import KVSource


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt is being computed."""

    num_cached_tokens: int
    queue_s: float


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The token after the prompt."""

    output: TokenOutput
    compute_s: float


@dataclass(frozen=True, slots=True)
class Complete:
    """All KV was sent and acknowledged."""

    stats: TransferStats


Event = Started | FirstToken | Complete


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a decode worker asks for.

    Attributes:
        request_id: The router's id of it, to which the ticket is bound.
        request: What to compute; its id tells attempts apart.
        num_held_blocks: Leading blocks that the decode worker has: they do not travel.
        sources: Who else has more of the prompt's KV than this worker, best first.
    """

    request_id: str
    request: EngineRequest
    num_held_blocks: int
    sources: tuple[KVSource, ...] = ()


class PrefillWorker:
    """Computes prompts with `engine` and ships their blocks with `senders`; holds nothing between requests."""

    def __init__(self, engine: Engine, senders: KVSenders) -> None:
        self._engine = engine
        self._senders = senders

    async def run(self, prompt: Prompt, grant: Awaitable[Grant], emit: Callable[[Event], None]) -> None:
        """Steps 1 to 6, reporting each event as it happens.

        Raises what the engine or the transfer raised. Cancelling it frees everything before it returns.
        """
        arrived = time.monotonic()
        started: float | None = None
        shipment = _Shipment(self._engine, self._senders, prompt, grant)
        async with aclosing(self._engine.prefill(prompt.request)) as updates:
            shipping = asyncio.create_task(shipment.run())
            try:
                async for update in updates:
                    if started is None:
                        started = time.monotonic()
                        emit(Started(update.num_cached_tokens, queue_s=started - arrived))
                    if shipping.done():
                        # It ends before the last block only by failing: no use computing on.
                        await shipping
                    shipment.offer(update.block_ids, update.num_computed_tokens, last=update.output is not None)
                    if update.output is not None:
                        emit(FirstToken(update.output, compute_s=time.monotonic() - started))
                        break
                emit(Complete(await shipping))
            finally:
                # Before the blocks go back: the sender reads them until it is closed.
                shipping.cancel()
                await settled(shipping)


class _Shipment:
    """The blocks of one prompt on their way: what is ready, what was sent."""

    def __init__(self, engine: Engine, senders: KVSenders, prompt: Prompt, grant: Awaitable[Grant]) -> None:
        self._memory = engine.memory
        self._block_size = engine.facts.block_size
        self._senders = senders
        self._prompt = prompt
        self._grant = grant
        self._block_ids: Sequence[int] = ()
        self._num_ready = prompt.num_held_blocks
        self._all_ready = False
        self._changed = asyncio.Event()

    def offer(self, block_ids: Sequence[int], num_computed_tokens: int, *, last: bool) -> None:
        """Full blocks among `block_ids` may go; with `last` the partial one too."""
        num_full = num_computed_tokens // self._block_size
        self._block_ids = block_ids
        self._num_ready = max(self._num_ready, len(block_ids) if last else num_full)
        self._all_ready = last
        self._changed.set()

    async def run(self) -> TransferStats:
        """Waits for the grant, sends what becomes ready, returns when the receiver has verified all of it."""
        grant = await self._grant
        num_held = self._prompt.num_held_blocks
        num_sent = num_held
        async with aclosing(self._senders.sender(grant, self._prompt.request_id)) as sender:
            await sender.open()
            while True:
                await self._changed.wait()
                self._changed.clear()
                last, ready = self._all_ready, self._block_ids[num_sent : self._num_ready]
                if ready:
                    self._memory.to_host(ready)
                    await sender.send(num_sent - num_held, ready)
                    num_sent += len(ready)
                if last:
                    return await sender.finish()
