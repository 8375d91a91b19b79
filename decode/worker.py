"""One request's life on a decode worker.

1. Its completions share the prompt. The first of them leads: it gets the prompt's KV here.
2. What left the prefix cache for a lower tier comes back if that is cheap; what the cache holds is pinned. If little
   is left to compute, or nobody is to be asked, the engine computes it here, like any prompt.
3. Otherwise prefill workers are asked, one after the other until one delivers (`Handoff`); if all fail, the
   engine computes it here after all. The first token is passed on once, whoever sampled it.
4. The KV that came is committed and the request joins the running batch.
5. The prompt's full blocks are in the prefix cache now: the other completions start from them.
6. Tokens are passed on as steps produce them. However it ends, every stream is closed and every lease released.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from decode.handoff import Failure, FirstToken, Handoff, PrefillTarget, Report
from engine.api import Engine, EngineRequest, ImportedPrompt, OutputStream, TokenOutput
from engine.request import check_stop
from pdmesh.errors import DeadlineError, InvalidRequestError, MeshError, UnavailableError
from pdmesh.sampling import SamplingParams
from worker.prefixes import Prefixes

log = logging.getLogger(__name__)

# Hand-offs of one attempt of a request; epochs of different attempts must not meet.
MAX_TARGETS = 8


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """What a router asks for.

    Attributes:
        attempt: How many decode workers had it before.
        delivered: Per completion to run, the tokens that the client has already.
        targets: Prefill workers to ask, best first.
    """

    request_id: str
    attempt: int
    prompt_token_ids: tuple[int, ...]
    delivered: Mapping[int, tuple[int, ...]]
    sampling: SamplingParams
    priority: int
    cache_salt: bytes
    targets: Sequence[PrefillTarget] = field(default=())

    def completion(self, index: int) -> EngineRequest:
        return EngineRequest(
            request_id=f"{self.request_id}/{self.attempt}/{index}",
            prompt_token_ids=self.prompt_token_ids,
            sampling=self.sampling,
            cache_salt=self.cache_salt,
            priority=self.priority,
            completion_index=index,
            output_token_ids=self.delivered[index],
        )


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """New tokens of one completion."""

    index: int
    output: TokenOutput


# A request's outputs, and once, if prefill workers were asked, how the prompt's KV came.
Event = CompletionOutput | Report
Emit = Callable[[Event], None]


class DecodeWorker:
    """Runs requests on `engine`; holds nothing between them.

    Args:
        engine: Generates.
        handoff: Gets prompts from prefill workers.
        prefixes: Brings back what left the engine's cache.
        short_prefill_tokens: Prompts with fewer tokens to compute are computed here.
    """

    def __init__(self, engine: Engine, handoff: Handoff, prefixes: Prefixes, short_prefill_tokens: int) -> None:
        self._engine = engine
        self._handoff = handoff
        self._prefixes = prefixes
        self._short_prefill_tokens = short_prefill_tokens

    def validate(self, request: DecodeRequest) -> None:
        """Raises InvalidRequestError for what this engine could never run."""
        for index in request.delivered:
            self._engine.validate(request.completion(index))

    async def run(self, request: DecodeRequest, emit: Emit) -> None:
        """Runs every completion to its end. Cancelling it frees everything before it returns.

        Raises what the first completion to fail failed with; the others are cancelled.
        """
        leader, *others = request.delivered
        prompt_is_here = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._lead(request, leader, emit, prompt_is_here))
                if others:
                    await prompt_is_here.wait()
                    for index in others:
                        outputs = self._engine.generate(request.completion(index))
                        group.create_task(self._forward(outputs, index, emit))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def _lead(self, request: DecodeRequest, index: int, emit: Emit, prompt_is_here: asyncio.Event) -> None:
        completion = request.completion(index)
        report = Report()
        await self._prefixes.bring(completion.prompt_token_ids + completion.output_token_ids, completion.cache_salt)
        first = _FirstTokenOnce(completion, index, self._engine.model.max_model_len, report, emit)
        imported = await self._fetch(request, completion, first, report) if request.targets else None
        if report.worker_id and not first.finished:
            emit(report if imported is not None else Report(failures=report.failures))
        if first.finished:
            prompt_is_here.set()
        elif imported is not None:
            outputs = self._engine.generate(completion, imported)
            # The engine takes requests in order: whoever comes after finds the imported blocks committed.
            prompt_is_here.set()
            await self._forward(outputs, index, emit)
        else:

            def emit_local(event: Event) -> None:
                prompt_is_here.set()
                emit(event)

            outputs = self._engine.generate(first.resumed())
            await self._forward(outputs, index, emit_local)

    async def _forward(self, outputs: OutputStream, index: int, emit: Emit) -> None:
        async with aclosing(outputs):
            async for output in outputs:
                emit(CompletionOutput(index, output))

    async def _fetch(
        self, request: DecodeRequest, completion: EngineRequest, first: "_FirstTokenOnce", report: Report
    ) -> ImportedPrompt | None:
        """The prompt's KV from a prefill worker; None where it is to be computed here, or no KV is needed."""
        token_ids = completion.prompt_token_ids + completion.output_token_ids
        lease = await self._engine.acquire_prefix(token_ids, completion.cache_salt)
        held = False
        try:
            num_cached_tokens = lease.num_cached_blocks * self._engine.facts.block_size
            wants_prompt_logprobs = completion.sampling.prompt_logprobs is not None and not completion.output_token_ids
            if len(token_ids) - num_cached_tokens < self._short_prefill_tokens and not wants_prompt_logprobs:
                return None
            for number, target in enumerate(request.targets[:MAX_TARGETS]):
                epoch = request.attempt * MAX_TARGETS + number
                try:
                    held = await self._handoff.run(
                        target, completion, request.request_id, epoch, lease, report, first.deliver
                    )
                except (InvalidRequestError, DeadlineError):
                    raise
                except MeshError as error:
                    unreachable = isinstance(error, UnavailableError) and error.peer_is_gone
                    report.failures.append(Failure(target, unreachable))
                    log.warning(
                        "prefill on %s failed: %s", target.worker_id, error.message,
                        extra={"request_id": request.request_id, "reason": error.reason},
                    )  # fmt: skip
                    continue
                assert held or first.finished
                return ImportedPrompt(lease, first.token_id) if held else None
            return None
        finally:
            if not held:
                await self._engine.release(lease)


class _FirstTokenOnce:
    """The token after the prompt, passed on once although several prefill workers may sample it."""

    def __init__(self, completion: EngineRequest, index: int, max_model_len: int, report: Report, emit: Emit) -> None:
        self._completion = completion
        self._index = index
        self._max_model_len = max_model_len
        self._emit = emit
        self._token: FirstToken | None = None
        self._report = report
        self.finished = False

    @property
    def token_id(self) -> int:
        assert self._token is not None
        return self._token.token_id

    def deliver(self, token: FirstToken) -> bool:
        """Passes the token on if it is the first to come. Returns whether generation goes on after it."""
        if self._token is None:
            self._token = token
            completion = self._completion
            num_output_tokens = len(completion.output_token_ids) + 1
            stop = check_stop(
                completion.sampling,
                token_id=token.token_id,
                num_output_tokens=num_output_tokens,
                num_tokens=len(completion.prompt_token_ids) + num_output_tokens,
                max_model_len=self._max_model_len,
            )
            self.finished = stop is not None
            output = TokenOutput(
                first_token_index=len(completion.output_token_ids),
                token_ids=(token.token_id,),
                logprobs=token.logprobs,
                prompt_logprobs=token.prompt_logprobs,
                num_cached_tokens=self._report.num_cached_tokens,
                finish_reason=stop.reason if stop else None,
                matched_token_id=stop.matched_token_id if stop else None,
            )
            if self.finished:
                self._emit(self._report)
            self._emit(CompletionOutput(self._index, output))
        return not self.finished

    def resumed(self) -> EngineRequest:
        """What remains to be generated here, where the KV of a delivered first token never came."""
        if self._token is None:
            return self._completion
        return replace(self._completion, output_token_ids=(*self._completion.output_token_ids, self._token.token_id))
