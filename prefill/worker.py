"""One prompt's life on a prefill worker.

1. What is cheaper to bring than to compute comes into the engine's cache: from this worker's tiers, from another
   worker, from a store. Meanwhile the connection to the decode worker is opened. Then the prompt queues in the engine;
   no memory is held for it anywhere.
2. First scheduled: the decode worker is told (`Started`), and answers in its time with a grant.
3. Each step computes a chunk. Blocks that are full and not held by the decode worker become ready; once the
   grant is here they are sent, while the next chunk computes.
4. The last step samples the first token, passed on at once (`FirstToken`). If decode has no room yet, the KV
   stays here, in the request's own blocks, until the grant comes, or the stream or the lease ends.
5. The rest is sent, the receiver acknowledges all of it (`Complete`). A transport that fails is told
   (`TransferFailed`); the next grant is for another one, and all is sent again.
6. Its full blocks are offered to the cluster's stores.
7. However it ends, the departure is closed and the blocks go back, in one `finally`.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from engine.api import Engine, EngineRequest, PrefillStream, PrefillUpdate, TokenOutput
from kvstore.nodes.departure import Departure, SendingNodes
from kvstore.nodes.flows import Flow, Receiver
from kvstore.transfer.base import Grant, TransferStats
from kvstore.transfer.streams import acknowledged
from pdmesh.errors import CancelledRequestError, MeshError
from pdmesh.hashing import BlockHash, block_hash, root_hash
from pdmesh.tasks import beside
from pdmesh.types import KVSource
from worker.prefixes import Prefixes
from worker.store_feed import StoreFeed


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt is being computed."""

    num_cached_tokens: int
    queue_s: float
    flows: tuple[Flow, ...]


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The token after the prompt."""

    output: TokenOutput
    compute_s: float


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """A grant of a flow came to nothing."""

    flow: int
    grant_number: int
    error: MeshError


@dataclass(frozen=True, slots=True)
class Complete:
    """All KV was sent and acknowledged."""

    stats: TransferStats


Event = Started | FirstToken | TransferFailed | Complete


@dataclass(frozen=True, slots=True)
class NumberedGrant:
    """A grant, of which flow it is, and which of that flow's."""

    flow: int
    number: int
    grant: Grant


@dataclass(frozen=True, slots=True)
class SignOfLife:
    """The decode worker is there."""


# What a decode worker sends after its request.
Message = NumberedGrant | SignOfLife


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a decode worker asks for.

    Attributes:
        request_id: The router's id of it, to which the ticket is bound.
        request: What to compute; its id tells attempts apart.
        num_held_blocks: Leading blocks that the decode worker has: they do not travel.
        decode_worker_id: Who asks.
        receivers: Where it receives the others.
        sources: Who else has more of the prompt's KV than this worker, best first.
    """

    request_id: str
    request: EngineRequest
    num_held_blocks: int
    decode_worker_id: str
    receivers: Sequence[Receiver]
    sources: tuple[KVSource, ...] = ()


class PrefillWorker:
    """Computes prompts with `engine` and ships their blocks from `nodes`; holds nothing between requests.

    Args:
        engine: Computes.
        nodes: Have the blocks, and ship them.
        prefixes: Brings what need not be computed.
        feed: Is offered what was computed.
    """

    def __init__(self, engine: Engine, nodes: SendingNodes, prefixes: Prefixes, feed: StoreFeed) -> None:
        self._engine = engine
        self._nodes = nodes
        self._prefixes = prefixes
        self._feed = feed

    async def run(self, prompt: Prompt, messages: AsyncIterator[Message], emit: Callable[[Event], None]) -> None:
        """Steps 1 to 7, reporting each event as it happens.

        Args:
            messages: From the decode worker. It may leave at any time, by ending them or by failing them.

        Raises what the engine or the transfer raised. Cancelling it frees everything before it returns.
        """

        def on_failed(flow: int, grant_number: int, error: MeshError) -> None:
            emit(TransferFailed(flow, grant_number, error))

        arrived = time.monotonic()
        request = prompt.request
        if request.sampling.prompt_logprobs is None:
            token_ids = request.prompt_token_ids + request.output_token_ids
            await self._prefixes.bring(token_ids, request.cache_salt, prompt.sources)
        # The departure is closed first: it reads blocks that the engine then takes back.
        async with (
            aclosing(self._engine.prefill(request)) as updates,
            aclosing(
                self._nodes.departure(prompt.receivers, prompt.request_id, prompt.decode_worker_id, on_failed)
            ) as departure,
        ):
            # It ends before the last block is computed only by failing: then computing on is of no use.
            stats = await beside(
                departure.wait(), self._compute(prompt, arrived, updates, departure, emit), _listen(messages, departure)
            )
        emit(Complete(stats))

    async def _compute(
        self,
        prompt: Prompt,
        arrived: float,
        updates: PrefillStream,
        departure: Departure,
        emit: Callable[[Event], None],
    ) -> None:
        """Offers blocks as they are computed, up to the first token."""
        started: float | None = None
        async for update in updates:
            if started is None:
                started = time.monotonic()
                emit(Started(update.num_cached_tokens, started - arrived, await departure.negotiated()))
            hashes = self._hashes(prompt.request, update)
            travelling = slice(prompt.num_held_blocks, len(hashes))
            departure.offer(update.block_ids[travelling], hashes[travelling], last=update.output is not None)
            if update.output is not None:
                emit(FirstToken(update.output, compute_s=time.monotonic() - started))
                self._feed.offer(update.block_hashes)

    def _hashes(self, request: EngineRequest, update: PrefillUpdate) -> Sequence[BlockHash]:
        """Identity of the blocks that may travel: the full ones, and at the end the partial one too."""
        hashes = update.block_hashes
        if update.output is None or len(hashes) == len(update.block_ids):
            return hashes
        token_ids = request.prompt_token_ids + request.output_token_ids
        parent = hashes[-1] if hashes else root_hash(request.cache_salt)
        return *hashes, block_hash(parent, token_ids[len(hashes) * self._engine.facts.block_size :])


async def _listen(messages: AsyncIterator[Message], departure: Departure) -> None:
    async for message in messages:
        match message:
            case NumberedGrant():
                departure.granted(message.flow, message.number, message.grant)
            case SignOfLife():
                departure.alive()
    await acknowledged(
        departure.wait(),
        CancelledRequestError("the decode worker closed its side before it had the KV", stage="prefill"),
    )
