"""Printing an answer while it comes, and in one line what it took."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pdmesh.cli.connection import SamplingConfig
from pdmesh.client_calls import GenerateOptions
from pdmesh.generation import Chunk, Event, EventCollector, GenerationResult


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, and when its tokens arrived here.

    Attributes:
        ttft_s: From the request to the first token.
        decode_s: From the first token to the last.
    """

    result: GenerationResult
    ttft_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens after the first one, a second; 0 where there are none."""
        num_later = self.result.usage.completion_tokens - 1
        return num_later / self.decode_s if num_later > 0 and self.decode_s > 0 else 0.0

    def summary(self) -> str:
        usage, report = self.result.usage, self.result.report
        parts = [f"{usage.completion_tokens} tokens", f"first after {self.ttft_s * 1000:.0f} ms"]
        if self.tokens_per_s:
            parts.append(f"then {self.tokens_per_s:.1f} tokens/s")
        if usage.cached_tokens:
            parts.append(f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached")
        if report.prefill_worker_id:
            moved = f" ({mib(report.kv_bytes)} KV over {report.kv_transport})" if report.kv_bytes else ""
            parts.append(f"{report.prefill_worker_id} → {report.decode_worker_id}{moved}")
        else:
            parts.append(f"all on {report.decode_worker_id}")
        return " · ".join(parts)


def receive(events: Iterator[Event], write: Callable[[str], None]) -> Answer:
    """Passes the text on as it comes, and returns the whole."""
    collector = EventCollector()
    asked_at = time.monotonic()
    first_at = last_at = asked_at
    for event in events:
        collector.add(event)
        if isinstance(event, Chunk):
            last_at = time.monotonic()
            if first_at == asked_at:
                first_at = last_at
            write(event.text)
    return Answer(collector.result(), ttft_s=first_at - asked_at, decode_s=last_at - first_at)


def sampling_options(config: SamplingConfig) -> GenerateOptions:
    options = GenerateOptions(max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p)
    if config.seed is not None:
        options["seed"] = config.seed
    return options


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
