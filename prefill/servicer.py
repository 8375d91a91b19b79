"""`pdmesh.v1.Prefill` on the wire: messages in, events out; the work is `PrefillWorker`'s."""

import asyncio
from collections.abc import AsyncIterator

from engine.api import EngineRequest
from kvstore.transfer.base import Grant, TransportOffer
from kvstore.transfer.states import HEARTBEAT_S
from pdmesh.errors import InvalidRequestError, PreconditionError
from pdmesh.sampling import SamplingParams
from pdmesh.types import KVSource, PairingFacts
from pdmesh.v1 import kv_transfer_pb2 as kv_pb
from pdmesh.v1 import prefill_pb2 as pb
from pdmesh.v1 import prefill_pb2_grpc
from prefill.worker import (
    Complete,
    Event,
    FirstToken,
    Message,
    NumberedGrant,
    PrefillWorker,
    Prompt,
    SignOfLife,
    Started,
    TransferFailed,
)
from worker.host import WorkerHost


class PrefillServicer(prefill_pb2_grpc.PrefillServicer):
    """Checks that the two workers may pair, then runs one prompt per stream.

    Args:
        host: Admits requests.
        worker: Does the work.
    """

    def __init__(self, host: WorkerHost, worker: PrefillWorker) -> None:
        self._host = host
        self._worker = worker

    async def Run(
        self, request_iterator: AsyncIterator[pb.RunRequest], context: object
    ) -> AsyncIterator[pb.RunResponse]:
        opening = await anext(aiter(request_iterator), None)
        if opening is None or not opening.HasField("start"):
            raise InvalidRequestError("Prefill.Run must begin with a RunStart", stage="prefill")
        start = opening.start
        with self._host.admitted(start.expected_incarnation):
            self._check_pairing(start)
            prompt = self._prompt(start)
            events: asyncio.Queue[Event | None] = asyncio.Queue()
            running = asyncio.create_task(self._worker.run(prompt, _messages(request_iterator), events.put_nowait))
            running.add_done_callback(lambda _: events.put_nowait(None))
            try:
                async for response in _responses(events):
                    yield response
                await running
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    def _check_pairing(self, start: pb.RunStart) -> None:
        mismatch = self._host.engine.facts.mismatch(PairingFacts.from_pb(start.facts))
        if mismatch:
            raise PreconditionError(
                f"{self._host.worker_id} cannot serve {start.decode_worker_id}: {mismatch}",
                reason="PAIRING_MISMATCH",
                stage="prefill",
            )

    def _prompt(self, start: pb.RunStart) -> Prompt:
        request = EngineRequest(
            request_id=f"{start.request_id}/{start.attempt}",
            prompt_token_ids=tuple(start.prompt_token_ids),
            sampling=SamplingParams.from_pb(start.sampling_params),
            cache_salt=start.cache_salt,
            priority=start.priority,
            completion_index=start.completion_index,
            output_token_ids=tuple(start.output_token_ids),
        )
        self._host.engine.validate(request)
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        if start.num_held_blocks * self._host.engine.facts.block_size >= num_tokens:
            raise InvalidRequestError(
                f"{start.num_held_blocks} held blocks leave nothing of {num_tokens} tokens to compute", stage="prefill"
            )
        offers = [TransportOffer(offer.name, offer.address) for offer in start.offers]
        sources = tuple(KVSource.from_pb(source) for source in start.sources)
        return Prompt(start.request_id, request, start.num_held_blocks, start.decode_worker_id, offers, sources)


async def _messages(requests: AsyncIterator[pb.RunRequest]) -> AsyncIterator[Message]:
    async for request in requests:
        match request.WhichOneof("event"):
            case "grant":
                grant = request.grant
                ticket = Grant(bytes(grant.ticket), grant.epoch, grant.transport, grant.address)
                yield NumberedGrant(grant.number, ticket)
            case "heartbeat":
                yield SignOfLife()
            case _:
                raise InvalidRequestError("Prefill.Run takes one RunStart, then grants and heartbeats", stage="prefill")


async def _responses(events: asyncio.Queue[Event | None]) -> AsyncIterator[pb.RunResponse]:
    """The events up to None, and heartbeats where there are none to send."""
    while True:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                event = await events.get()
        except TimeoutError:
            yield pb.RunResponse(heartbeat=kv_pb.Heartbeat())
            continue
        if event is None:
            return
        yield _to_pb(event)


def _to_pb(event: Event) -> pb.RunResponse:
    match event:
        case Started():
            return pb.RunResponse(
                started=pb.RunStarted(
                    num_cached_tokens=event.num_cached_tokens,
                    queue_s=event.queue_s,
                    transports=event.negotiation.usable,
                    unusable=dict(event.negotiation.unusable),
                )
            )
        case FirstToken():
            output = event.output
            return pb.RunResponse(
                first_token=pb.FirstToken(
                    token_id=output.token_ids[0],
                    logprob=output.logprobs[0].to_pb() if output.logprobs else None,
                    prompt_logprobs=[logprob.to_pb() for logprob in output.prompt_logprobs],
                    compute_s=event.compute_s,
                )
            )
        case TransferFailed():
            return pb.RunResponse(
                transfer_failed=kv_pb.TransferFailed(
                    grant_number=event.grant_number, reason=event.error.reason, message=event.error.message
                )
            )
        case Complete():
            stats = event.stats
            return pb.RunResponse(
                complete=pb.RunComplete(
                    kv_bytes=stats.num_bytes, num_parts=stats.num_parts, transfer_s=stats.duration_s
                )
            )
