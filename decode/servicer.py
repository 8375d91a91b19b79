"""`pdmesh.v1.Decode` on the wire: messages in, tokens out; the work is `DecodeWorker`'s."""

import asyncio
from collections.abc import AsyncIterator

from decode.handoff import PrefillTarget, Report
from decode.worker import CompletionOutput, DecodeRequest, DecodeWorker, Event
from pdmesh.errors import InvalidRequestError
from pdmesh.sampling import SamplingParams
from pdmesh.types import KVSource, finish_reason_to_pb
from pdmesh.v1 import decode_pb2 as pb
from pdmesh.v1 import decode_pb2_grpc
from worker.host import WorkerHost


class DecodeServicer(decode_pb2_grpc.DecodeServicer):
    """Admits requests and streams their tokens."""

    def __init__(self, host: WorkerHost, worker: DecodeWorker) -> None:
        self._host = host
        self._worker = worker

    async def Generate(
        self, request: pb.DecodeGenerateRequest, context: object
    ) -> AsyncIterator[pb.DecodeGenerateResponse]:
        with self._host.admitted(request.expected_incarnation):
            decoded = _from_pb(request)
            self._worker.validate(decoded)
            events: asyncio.Queue[Event | None] = asyncio.Queue()
            running = asyncio.create_task(self._worker.run(decoded, events.put_nowait))
            running.add_done_callback(lambda _: events.put_nowait(None))
            try:
                while (event := await events.get()) is not None:
                    if isinstance(event, Report):
                        yield pb.DecodeGenerateResponse(prefill=_report_to_pb(event))
                        continue
                    yield _tokens_to_pb(event)
                    if event.output.finish_reason is not None:
                        yield _finished_to_pb(event)
                await running
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)


def _from_pb(message: pb.DecodeGenerateRequest) -> DecodeRequest:
    sampling = SamplingParams.from_pb(message.sampling_params)
    resume = {point.index: point for point in message.resume}
    delivered = {
        index: tuple(resume[index].output_token_ids) if index in resume else ()
        for index in range(sampling.n)
        if index not in resume or not resume[index].finished
    }
    if not delivered:
        raise InvalidRequestError("every completion is finished already: nothing to generate", stage="decode")
    return DecodeRequest(
        request_id=message.request_id,
        attempt=message.attempt,
        prompt_token_ids=tuple(message.prompt_token_ids),
        delivered=delivered,
        sampling=sampling,
        priority=message.priority,
        cache_salt=message.cache_salt,
        targets=[_target(target) for target in message.prefill_targets],
    )


def _target(message: pb.PrefillTarget) -> PrefillTarget:
    sources = tuple(KVSource.from_pb(source) for source in message.sources)
    return PrefillTarget(message.worker_id, message.incarnation, message.address, sources)


def _tokens_to_pb(completion: CompletionOutput) -> pb.DecodeGenerateResponse:
    output = completion.output
    return pb.DecodeGenerateResponse(
        tokens=pb.DecodeTokens(
            index=completion.index,
            first_token_index=output.first_token_index,
            token_ids=output.token_ids,
            logprobs=[entry.to_pb() for entry in output.logprobs],
            prompt_logprobs=[entry.to_pb() for entry in output.prompt_logprobs],
            cached_tokens=output.num_cached_tokens,
        )
    )


def _finished_to_pb(completion: CompletionOutput) -> pb.DecodeGenerateResponse:
    output = completion.output
    assert output.finish_reason is not None
    return pb.DecodeGenerateResponse(
        finished=pb.DecodeFinished(
            index=completion.index,
            finish_reason=finish_reason_to_pb(output.finish_reason),
            matched_token_id=output.matched_token_id,
        )
    )


def _report_to_pb(report: Report) -> pb.PrefillReport:
    return pb.PrefillReport(
        worker_id=report.worker_id,
        transport=report.transport,
        kv_bytes=report.kv_bytes,
        queue_s=report.queue_s,
        compute_s=report.compute_s,
        transfer_s=report.transfer_s,
        failures=[
            pb.PrefillFailure(
                worker_id=failure.target.worker_id,
                incarnation=failure.target.incarnation,
                unreachable=failure.unreachable,
            )
            for failure in report.failures
        ],
    )
