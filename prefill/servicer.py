"""`pdmesh.v1.Prefill` on the wire: messages in, events out; the work is `PrefillWorker`'s."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from engine.api import EngineRequest
from kvstore.nodes.messages import flows_to_pb, receivers_from_pb
from kvstore.transfer.messages import failed_to_pb, grant_from_pb
from kvstore.transfer.streams import responses_of
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
            messages = _messages(request_iterator)

            async def work(emit: Callable[[pb.RunResponse], None]) -> None:
                await self._worker.run(prompt, messages, lambda event: emit(_to_pb(event)))

            async with aclosing(responses_of(work, pb.RunResponse(heartbeat=kv_pb.Heartbeat()))) as responses:
                async for response in responses:
                    yield response

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
        receivers = receivers_from_pb(start.receivers)
        if not receivers or not all(receiver.runs for receiver in receivers):
            raise InvalidRequestError("RunStart names no memory that is to receive the KV", stage="prefill")
        sources = tuple(KVSource.from_pb(source) for source in start.sources)
        return Prompt(start.request_id, request, start.num_held_blocks, start.decode_worker_id, receivers, sources)


async def _messages(requests: AsyncIterator[pb.RunRequest]) -> AsyncIterator[Message]:
    async for request in requests:
        match request.WhichOneof("event"):
            case "grant":
                yield NumberedGrant(request.grant.flow, request.grant.number, grant_from_pb(request.grant))
            case "heartbeat":
                yield SignOfLife()
            case _:
                raise InvalidRequestError("Prefill.Run takes one RunStart, then grants and heartbeats", stage="prefill")


def _to_pb(event: Event) -> pb.RunResponse:
    match event:
        case Started():
            return pb.RunResponse(
                started=pb.RunStarted(
                    num_cached_tokens=event.num_cached_tokens,
                    queue_s=event.queue_s,
                    flows=flows_to_pb(event.flows),
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
            return pb.RunResponse(transfer_failed=failed_to_pb(event.grant_number, event.error, event.flow))
        case Complete():
            stats = event.stats
            return pb.RunResponse(
                complete=pb.RunComplete(
                    kv_bytes=stats.num_bytes, num_parts=stats.num_parts, transfer_s=stats.duration_s
                )
            )
