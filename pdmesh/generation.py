"""What a generation gives back: the events of its stream, and the result that they add up to.

Started, then per completion Chunk … Chunk, Complete
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from pdmesh.errors import InternalError
from pdmesh.types import FinishReason, TokenLogprob, finish_reason_from_pb
from pdmesh.v1 import common_pb2, inference_pb2


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts so far. `cached_tokens` are those of the prompt whose KV was found in a cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @classmethod
    def from_pb(cls, message: common_pb2.Usage) -> Usage:
        return cls(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


@dataclass(frozen=True, slots=True)
class RequestReport:
    """Where a request ran and what it cost; see inference.proto for each field."""

    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    kv_transport: str = ""
    kv_bytes: int = 0
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    ttft_s: float = 0.0
    prefill_retries: int = 0
    decode_resumes: int = 0

    @classmethod
    def from_pb(cls, message: inference_pb2.RequestReport) -> RequestReport:
        return cls(**{f.name: getattr(message, f.name) for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted. `seed` is the one in use, drawn by the router unless given."""

    request_id: str
    model: str
    seed: int
    prompt_tokens: int

    @classmethod
    def from_pb(cls, message: inference_pb2.GenerateStarted) -> Started:
        return cls(message.request_id, message.model, message.seed, message.prompt_tokens)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new in completion `index`: tokens, and the text that is complete by now (it lags behind them)."""

    index: int
    first_token_index: int
    token_ids: tuple[int, ...]
    text: str
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def from_pb(cls, message: inference_pb2.GenerateChunk) -> Chunk:
        return cls(
            index=message.index,
            first_token_index=message.first_token_index,
            token_ids=tuple(message.token_ids),
            text=message.text,
            usage=Usage.from_pb(message.usage),
            logprobs=tuple(map(TokenLogprob.from_pb, message.logprobs)),
            prompt_logprobs=tuple(map(TokenLogprob.from_pb, message.prompt_logprobs)),
        )


@dataclass(frozen=True, slots=True)
class Complete:
    """Completion `index` has ended. `matched_stop` is the token id or string that ended it, if one did."""

    index: int
    finish_reason: FinishReason
    matched_stop: int | str | None
    usage: Usage
    report: RequestReport

    @classmethod
    def from_pb(cls, message: inference_pb2.GenerateComplete) -> Complete:
        matched: int | str | None = None
        match message.WhichOneof("matched_stop"):
            case "matched_token_id":
                matched = message.matched_token_id
            case "matched_stop_str":
                matched = message.matched_stop_str
        return cls(
            index=message.index,
            finish_reason=finish_reason_from_pb(message.finish_reason),
            matched_stop=matched,
            usage=Usage.from_pb(message.usage),
            report=RequestReport.from_pb(message.report),
        )


Event = Started | Chunk | Complete


def event_from_pb(message: inference_pb2.GenerateResponse) -> Event | None:
    """The event in a message of the stream; None for a kind that only a newer server knows."""
    match message.WhichOneof("event"):
        case "started":
            return Started.from_pb(message.started)
        case "chunk":
            return Chunk.from_pb(message.chunk)
        case "complete":
            return Complete.from_pb(message.complete)
        case _:
            return None


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched_stop: int | str | None
    usage: Usage
    logprobs: tuple[TokenLogprob, ...]
    report: RequestReport


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole generation. With n = 1, the usual case, its properties are those of the one completion."""

    request_id: str
    model: str
    seed: int
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.completions[0].logprobs

    @property
    def report(self) -> RequestReport:
        return self.completions[0].report

    @property
    def usage(self) -> Usage:
        """The prompt once, the output tokens of all completions."""
        first = self.completions[0].usage
        num_completion_tokens = sum(completion.usage.completion_tokens for completion in self.completions)
        return Usage(first.prompt_tokens, num_completion_tokens, first.cached_tokens)


@dataclass(slots=True)
class _Answer:
    """A completion while it grows."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    complete: Complete | None = None


class EventCollector:
    """Adds the events of one stream up to its result."""

    def __init__(self) -> None:
        self._started: Started | None = None
        self._answers: dict[int, _Answer] = {}
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def add(self, event: Event) -> None:
        if isinstance(event, Started):
            self._started = event
            return
        answer = self._answers.setdefault(event.index, _Answer())
        if isinstance(event, Complete):
            answer.complete = event
            return
        answer.texts.append(event.text)
        answer.token_ids += event.token_ids
        answer.logprobs += event.logprobs
        self._prompt_logprobs = event.prompt_logprobs or self._prompt_logprobs

    def result(self) -> GenerationResult:
        """Raises InternalError where the stream ended with a completion unfinished: a server's defect."""
        completions = [
            Completion(
                index=index,
                text="".join(answer.texts),
                token_ids=tuple(answer.token_ids),
                finish_reason=answer.complete.finish_reason,
                matched_stop=answer.complete.matched_stop,
                usage=answer.complete.usage,
                logprobs=tuple(answer.logprobs),
                report=answer.complete.report,
            )
            for index, answer in sorted(self._answers.items())
            if answer.complete is not None
        ]
        if self._started is None or not completions or len(completions) < len(self._answers):
            raise InternalError("the stream ended without an error before its answer was complete")
        return GenerationResult(
            request_id=self._started.request_id,
            model=self._started.model,
            seed=self._started.seed,
            completions=tuple(completions),
            prompt_logprobs=self._prompt_logprobs,
        )
