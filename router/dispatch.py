"""The life of a request, once admitted:

1. Rank all decode workers, each with the prefill workers that could serve it (`router.policy`).
2. Take the best one and count the request up there; nothing is awaited in between.
3. Tell the client that the request has started.
4. Open Decode.Generate on the worker, with what is left of the client's time.
5. Forward: tokens become text, each absolute index passes once (`router.completion`).
6. A completion ends when the worker says so, or when its text holds a stop string. Where the last one ends by a stop
   string, the call is cancelled.
7. A worker that refuses before its first token is followed by the next best at once, until all have refused.
8. A worker that is lost after it delivered tokens is followed by another that goes on after them: 1, with the delivered
   tokens in ResumePoints and a higher attempt. Where there is none, the client is told why the first was lost.
9. Whatever ends the request (its last token, the client leaving, the deadline, an error): the call to the worker is
   cancelled and the request counted down, in one `finally`.

No step waits for a worker to become free: who has no room says so, and when nobody has, neither does the mesh.
"""

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import grpc

from pdmesh import status
from pdmesh.channels import ChannelPool
from pdmesh.errors import (
    CancelledRequestError,
    CorruptionError,
    DeadlineError,
    InternalError,
    MeshError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from pdmesh.types import Role
from pdmesh.v1 import decode_pb2, decode_pb2_grpc, inference_pb2
from router.admission import AdmittedRequest
from router.completion import Completion
from router.policy import Weights, rank
from router.registry import Assignment, WorkerRegistry
from router.text.detokenizer import TokenBytes
from router.text.stop_strings import StopStrings

log = logging.getLogger(__name__)

# Workers that may be lost under one request. More than these is no bad luck but the request itself.
MAX_RESUMES = 4

# Another worker can do what this one did not: it is full, was lost or restarted, or got damaged KV. CANCELLED comes
# from a server that stops: a client of ours that leaves cancels the task instead.
_TAKE_ANOTHER = (OverloadedError, UnavailableError, PreconditionError, CorruptionError, CancelledRequestError)

Responses = AsyncGenerator[inference_pb2.GenerateResponse, None]


class Dispatcher:
    """Runs admitted requests; see the module.

    Args:
        registry: Who lives.
        channels: To decode workers; not closed here.
        token_bytes: The model's vocabulary.
        weights, short_prefill_tokens: See `router.policy`.
    """

    def __init__(
        self,
        registry: WorkerRegistry,
        channels: ChannelPool,
        token_bytes: TokenBytes,
        weights: Weights,
        short_prefill_tokens: int,
    ) -> None:
        self._registry = registry
        self._channels = channels
        self._token_bytes = token_bytes
        self._weights = weights
        self._short_prefill_tokens = short_prefill_tokens

    async def run(self, request: AdmittedRequest, time_remaining: Callable[[], float | None]) -> Responses:
        """All responses of `request`; raises what ends it. Closing the iterator cancels the work everywhere.

        Args:
            time_remaining: Seconds until the client's deadline; None without one.
        """
        run = _Run(request, self._token_bytes, self._registry.mark_lost)
        refused: dict[str, MeshError] = {}
        lost: MeshError | None = None
        while True:
            assignment = self._assign(request, run.num_delivered, refused, lost)
            num_before = run.num_delivered
            call = None
            try:
                if not run.attempt:
                    yield _started(request)
                call = self._open(run, assignment, time_remaining())
                async with aclosing(run.forward(call, assignment)) as responses:
                    async for response in responses:
                        yield response
                return
            except (grpc.aio.AioRpcError, UnavailableError) as error:
                failure = _failure(error, assignment)
            finally:
                assignment.close()
                if call is not None:
                    call.cancel()
            self._note(failure, assignment)
            if not isinstance(failure, _TAKE_ANOTHER):
                raise failure
            if run.num_delivered == num_before:
                refused[assignment.decode.worker_id] = failure
            else:
                refused.clear()
                lost = failure
                run.num_resumes += 1
                for response in run.end_what_is_due():
                    yield response
                if run.finished:
                    return
                if run.num_resumes > MAX_RESUMES:
                    raise UnavailableError(
                        f"{run.num_resumes} decode workers were lost under this request; the last: {failure.message}",
                        reason="TOO_MANY_RESUMES",
                        stage="decode",
                    ) from failure

    def _assign(
        self, request: AdmittedRequest, num_delivered: int, refused: dict[str, MeshError], lost: MeshError | None
    ) -> Assignment:
        """Picks the best worker that has not refused, and counts the request up there.

        Raises OverloadedError or UnavailableError where none is left; the latter with the reason of `lost`, for which
        the last worker that delivered tokens was lost, or with the one for which all refused.
        """
        num_tokens = len(request.prompt_token_ids) + num_delivered
        cached = self._registry.cached_prefixes(request.hashes)
        ranked = rank(
            num_tokens,
            self._registry.candidates(Role.DECODE, cached),
            self._registry.candidates(Role.PREFILL, cached),
            self._weights,
            self._short_prefill_tokens,
        )
        for choice in ranked:
            if choice.decode_id not in refused:
                return self._registry.assign(choice, num_tokens, cached)
        if not refused:
            if lost is not None:
                raise UnavailableError(
                    f"{lost.message}, and no other decode worker takes requests now", reason=lost.reason, stage="decode"
                )
            raise UnavailableError(
                "no decode worker takes requests now; try again when one is ready",
                reason="NO_DECODE_WORKER",
                stage="routing",
            )
        reasons = "; ".join(f"{worker_id}: {error.message}" for worker_id, error in refused.items())
        if any(isinstance(error, OverloadedError) for error in refused.values()):
            raise OverloadedError(
                f"every decode worker refused ({reasons})", reason="ALL_WORKERS_FULL", stage="routing"
            )
        if lost is not None:
            message = f"{lost.message}, and no decode worker could go on ({reasons})"
            raise UnavailableError(message, reason=lost.reason, stage="decode")
        common = {error.reason if isinstance(error, UnavailableError) else None for error in refused.values()}
        reason = common.pop() if len(common) == 1 else None
        raise UnavailableError(f"no decode worker could be had ({reasons})", reason=reason, stage="routing")

    def _open(
        self, run: "_Run", assignment: Assignment, time_remaining_s: float | None
    ) -> grpc.aio.UnaryStreamCall[decode_pb2.DecodeGenerateRequest, decode_pb2.DecodeGenerateResponse]:
        if time_remaining_s is not None and time_remaining_s <= 0:
            raise DeadlineError("the deadline passed before a worker was found", stage="routing")
        run.attempt += 1
        stub = decode_pb2_grpc.DecodeStub(self._channels.get(assignment.decode.address))
        return stub.Generate(run.to_pb(assignment), timeout=time_remaining_s)

    def _note(self, failure: MeshError, assignment: Assignment) -> None:
        """Tells the registry of a worker that cannot be reached, or is another by now, or is on its way out."""
        worker = assignment.decode
        unreachable = isinstance(failure, UnavailableError) and (
            failure.peer_is_gone or failure.reason.startswith("WORKER_")
        )
        if unreachable or isinstance(failure, CancelledRequestError) or failure.reason == "STALE_INCARNATION":
            self._registry.mark_lost(worker.worker_id, worker.incarnation, failure.message)


class _Run:
    """What the client has of a request, over all attempts."""

    def __init__(
        self, request: AdmittedRequest, token_bytes: TokenBytes, mark_lost: Callable[[str, str, str], None]
    ) -> None:
        params = request.params
        stops = StopStrings(params.stop) if params.stop else None
        num_prompt = len(request.prompt_token_ids)
        self.completions = [Completion(i, num_prompt, params, stops, token_bytes) for i in range(params.n)]
        self.attempt = 0
        self.num_resumes = 0
        self.num_delivered = 0
        self._request = request
        self._report = inference_pb2.RequestReport()
        self._mark_lost = mark_lost

    @property
    def finished(self) -> bool:
        return all(completion.finished for completion in self.completions)

    def to_pb(self, assignment: Assignment) -> decode_pb2.DecodeGenerateRequest:
        request = self._request
        return decode_pb2.DecodeGenerateRequest(
            request_id=request.request_id,
            attempt=self.attempt,
            prompt_token_ids=request.prompt_token_ids,
            resume=[c.resume_point() for c in self.completions] if self.num_delivered else None,
            sampling_params=request.params.to_pb(),
            priority=request.priority,
            cache_salt=request.cache_salt,
            prefill_targets=[
                decode_pb2.PrefillTarget(
                    worker_id=place.info.worker_id,
                    incarnation=place.info.incarnation,
                    address=place.info.address,
                    sources=[source.to_pb() for source in place.sources],
                )
                for place in assignment.prefill
            ],
            expected_incarnation=assignment.decode.incarnation,
        )

    async def forward(
        self,
        call: grpc.aio.UnaryStreamCall[decode_pb2.DecodeGenerateRequest, decode_pb2.DecodeGenerateResponse],
        assignment: Assignment,
    ) -> Responses:
        """Responses to the client from the messages of one attempt.

        Raises AioRpcError, or UnavailableError where the worker breaks off or skips tokens.
        """
        worker_id = self._report.decode_worker_id = assignment.decode.worker_id
        completions = self.completions
        waiting_for_first = True
        try:
            async for message in call:
                if message.HasField("tokens"):
                    tokens = message.tokens
                    completion = _completion(completions, tokens.index, worker_id)
                    chunk = completion.accept(tokens)
                    if chunk is None:
                        continue
                    self.num_delivered += len(chunk.token_ids)
                    if waiting_for_first:
                        waiting_for_first = False
                        assignment.prompt_done()
                        if not self._report.ttft_s:
                            self._report.ttft_s = time.monotonic() - self._request.accepted_at
                    yield inference_pb2.GenerateResponse(chunk=chunk)
                    if completion.finished:
                        yield self._complete(completion)
                        if self.finished:
                            return
                elif message.HasField("prefill"):
                    self._take_over(message.prefill)
                else:
                    finished = message.finished
                    completion = _completion(completions, finished.index, worker_id)
                    if completion.finished:
                        continue
                    matched = finished.matched_token_id if finished.HasField("matched_token_id") else None
                    completion.end(finished.finish_reason, matched)
                    for response in self._endings(completion):
                        yield response
        except grpc.aio.AioRpcError:
            # What the client asked for is complete: how the worker's stream ends is of no interest to it.
            if not self.finished:
                raise
        if not self.finished:
            raise UnavailableError(f"{worker_id} ended its stream before the last token", stage="decode")

    def end_what_is_due(self) -> list[inference_pb2.GenerateResponse]:
        """Ends completions that have all their tokens, where a worker was lost before it could say so."""
        due = [completion for completion in self.completions if not completion.finished]
        for completion in due:
            completion.end_if_due()
        return [response for completion in due if completion.finished for response in self._endings(completion)]

    def _endings(self, completion: Completion) -> list[inference_pb2.GenerateResponse]:
        rest = completion.rest()
        responses = [inference_pb2.GenerateResponse(chunk=rest)] if rest is not None else []
        return [*responses, self._complete(completion)]

    def _complete(self, completion: Completion) -> inference_pb2.GenerateResponse:
        self._report.decode_resumes = self.num_resumes
        return inference_pb2.GenerateResponse(complete=completion.complete(self._report))

    def _take_over(self, prefill: decode_pb2.PrefillReport) -> None:
        """How the prompt's KV came, from an attempt's own report; of a resumed request, the latest counts."""
        report = self._report
        report.prefill_worker_id = prefill.worker_id
        report.kv_transport = prefill.transport
        report.kv_bytes = prefill.kv_bytes
        report.prefill_queue_s = prefill.queue_s
        report.prefill_s = prefill.compute_s
        report.transfer_s = prefill.transfer_s
        report.prefill_retries = len(prefill.failures)
        for failure in prefill.failures:
            if failure.unreachable:
                self._mark_lost(failure.worker_id, failure.incarnation, "a decode worker could not reach it")


def _started(request: AdmittedRequest) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        started=inference_pb2.GenerateStarted(
            request_id=request.request_id,
            model=request.model,
            seed=request.params.seed,
            prompt_tokens=len(request.prompt_token_ids),
        )
    )


def _completion(completions: list[Completion], index: int, worker_id: str) -> Completion:
    if index >= len(completions):
        raise InternalError(f"{worker_id} sent tokens of completion {index}, which nobody asked for", stage="decode")
    return completions[index]


def _failure(error: grpc.aio.AioRpcError | UnavailableError, assignment: Assignment) -> MeshError:
    failure = status.from_rpc_error(error, stage="decode") if isinstance(error, grpc.aio.AioRpcError) else error
    log.info(
        "%s: %s",
        type(failure).__name__,
        failure.message,
        extra={"worker_id": assignment.decode.worker_id, "reason": failure.reason},
    )
    return failure
