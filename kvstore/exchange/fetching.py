"""The calling end of `KVBlocks.Fetch`: a prompt's beginning from a process that has it.

we                                           a worker or store
  │ ── FetchStart: hashes, offers ─────────▶ │  holds the longest run that it has
  │ ◀──────────────────────────── FetchFound │
  │ reserve blocks                           │
  │ ── TransferGrant ──────────────────────▶ │
  │ ◀═══════ parts, over the transport ═════ │
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence

from kvstore.transfer.base import Grant, TransferStats
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.messages import grant_to_pb, offers_to_pb
from kvstore.transfer.receipt import Expected, Receipt
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.streams import ClientStream
from pdmesh.channels import ChannelPool
from pdmesh.errors import UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.tasks import beside
from pdmesh.types import KVSource, PairingFacts
from pdmesh.v1 import kv_blocks_pb2 as pb
from pdmesh.v1 import kv_blocks_pb2_grpc
from pdmesh.v1 import kv_transfer_pb2 as kv_pb

# A source that does not answer within this costs more than it saves.
FIND_TIMEOUT_S = 0.5


class BlockFetcher:
    """Fetches for one receiving worker.

    Args:
        worker_id: This worker's.
        hub: Receives.
        journal: Told of every transfer.
        channels: To the sources.
    """

    def __init__(self, worker_id: str, hub: ReceiverHub, journal: TransferJournal, channels: ChannelPool) -> None:
        self._worker_id = worker_id
        self._hub = hub
        self._journal = journal
        self._channels = channels
        self._numbers = itertools.count()
        self._ending: set[asyncio.Task[bool]] = set()

    async def fetch(
        self,
        source: KVSource,
        facts: PairingFacts,
        hashes: Sequence[BlockHash],
        num_held: int,
        reserve: Callable[[int], Awaitable[Sequence[int]]],
    ) -> TransferStats | None:
        """Brings what `source` has of the run `hashes` beyond its first `num_held` blocks.

        Args:
            reserve: Gives so many blocks to write to; called once, if there is anything to fetch.

        Returns None where the source has no more than that; else every byte is verified, in the blocks reserved.
        Raises MeshError; then the blocks hold nothing, and no writer can reach them any more.
        """
        stub = kv_blocks_pb2_grpc.KVBlocksStub(self._channels.get(source.address))
        request_id = f"{self._worker_id}/fetch-{next(self._numbers)}"
        stream: ClientStream[pb.FetchRequest, pb.FetchResponse] = ClientStream(
            stub.Fetch(), source.worker_id, pb.FetchRequest(heartbeat=kv_pb.Heartbeat()), stage="transfer"
        )
        start = pb.FetchStart(
            request_id=request_id,
            receiver_id=self._worker_id,
            facts=facts.to_pb(),
            block_hashes=hashes,
            num_held_blocks=num_held,
            offers=offers_to_pb(self._hub.offers),
        )
        try:
            stats = await self._receive(stream, source, start, hashes, num_held, reserve)
        except BaseException:
            await stream.aclose()
            raise
        ending = asyncio.create_task(stream.end())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        return stats

    async def aclose(self) -> None:
        """Waits for streams that are about to end; call it when nothing is being fetched."""
        if self._ending:
            await asyncio.wait(self._ending)

    async def _receive(
        self,
        stream: ClientStream[pb.FetchRequest, pb.FetchResponse],
        source: KVSource,
        start: pb.FetchStart,
        hashes: Sequence[BlockHash],
        num_held: int,
        reserve: Callable[[int], Awaitable[Sequence[int]]],
    ) -> TransferStats | None:
        responses = stream.responses()
        try:
            # Connecting included: a host that is gone lets nobody know.
            async with asyncio.timeout(FIND_TIMEOUT_S):
                await stream.write(pb.FetchRequest(start=start))
                found = (await anext(responses, pb.FetchResponse())).found
        except TimeoutError as error:
            raise UnavailableError(
                f"{source.worker_id} did not say within {FIND_TIMEOUT_S:g} s what it has", stage="transfer"
            ) from error
        num_blocks = min(found.num_blocks, len(hashes))
        if num_blocks <= num_held:
            return None
        block_ids = await reserve(num_blocks - num_held)
        expected = Expected(
            start.request_id, 0, source.worker_id, found.incarnation, block_ids, hashes[num_held:num_blocks]
        )
        receipt = Receipt(self._hub, self._journal)

        async def listen() -> None:
            async for response in responses:
                receipt.alive()
                match response.WhichOneof("event"):
                    case "transfer_failed":
                        failed = response.transfer_failed
                        receipt.failed(failed.grant_number, failed.reason, failed.message)
                    case "complete":
                        return

        async def grant(number: int, grant: Grant) -> None:
            await stream.write(pb.FetchRequest(grant=grant_to_pb(number, grant)))

        return await beside(receipt.run(expected, list(found.transports), grant), listen(), stream.beat())
