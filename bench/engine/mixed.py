"""Requests that decode all the time, and long prompts that arrive meanwhile: what each costs the other.

Three measurements on one engine: the prompts alone, one after the other; both together; the decoding alone, of the
same tokens of the same lengths as in the mixture.
"""

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import aclosing

from engine.api import EngineRequest
from engine.config import EngineConfig
from engine.local_engine import LocalEngine
from pdmesh.sampling import SamplingParams

NUM_STREAMS = 8
STREAM_PROMPT = 128
PROMPT = 1024
DURATION_S = 15.0
_INTERVAL_S = 1.0
_PROMPTS_ALONE = 6


class Decoding:
    """The streams' tokens: when each came, by stream, in the order of arrival."""

    def __init__(self) -> None:
        self.arrivals_s: list[list[float]] = [[] for _ in range(NUM_STREAMS)]
        self._num_wanted = 0
        self._reached = asyncio.Event()

    def add(self, stream: int, num_tokens: int) -> None:
        """Tokens of one stream have come now."""
        self.arrivals_s[stream] += [time.perf_counter()] * num_tokens
        if sum(map(len, self.arrivals_s)) >= self._num_wanted and all(self.arrivals_s):
            self._reached.set()

    async def reach(self, num_tokens: int) -> None:
        """Waits until so many tokens have come in all, and one of each stream."""
        self._num_wanted = num_tokens
        self._reached.clear()
        await self._reached.wait()

    def gaps_s(self, begin: float, end: float) -> list[float]:
        """Times from token to token, of those that came between two moments."""
        return [
            late - early
            for times in self.arrivals_s
            for early, late in itertools.pairwise(times)
            if begin <= early and late <= end
        ]

    def time_of(self, count: int) -> float:
        """When so many tokens had come, of all streams together."""
        return sorted(itertools.chain.from_iterable(self.arrivals_s))[count - 1]


async def measure(config: EngineConfig) -> dict[str, float]:
    """Milliseconds and tokens/s of both loads, alone and together; see `summarise`."""
    engine = LocalEngine(config)
    try:
        await engine.start(lambda done, total: None)
        return await _Mixture(engine).measure()
    finally:
        await engine.close()


class _Mixture:
    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._draw = random.Random(0)
        self._numbers = itertools.count()

    async def measure(self) -> dict[str, float]:
        await self._prompts_alone()
        before = await self._prompts_alone()
        mixed, begin, done_s = await self._together()
        after = await self._prompts_alone()
        end = begin + DURATION_S
        inside = [sum(begin < seen <= end for seen in times) for times in mixed.arrivals_s]
        earlier = sum(seen <= begin for times in mixed.arrivals_s for seen in times)
        alone = await self._streams_alone(earlier, earlier + sum(inside))
        num_done = sum(seen <= end for seen in done_s)
        return summarise(
            gaps_s=mixed.gaps_s(begin, end),
            decode_mixed=sum(inside) / DURATION_S,
            decode_alone=alone,
            prefill_mixed=num_done * PROMPT / DURATION_S,
            prefill_alone=statistics.mean((before, after)),
        )

    async def _prompts_alone(self) -> float:
        """Prompt tokens/s."""
        began = time.perf_counter()
        for _ in range(_PROMPTS_ALONE):
            await self._prompt()
        return _PROMPTS_ALONE * PROMPT / (time.perf_counter() - began)

    async def _together(self) -> tuple[Decoding, float, list[float]]:
        """The streams' tokens, when the first prompt came, and when each prompt was done."""
        decoding = Decoding()
        async with asyncio.TaskGroup() as group:
            streams = self._start_streams(group, decoding)
            await decoding.reach(8 * NUM_STREAMS)
            begin = time.perf_counter()
            prompts = []
            for number in range(int(DURATION_S / _INTERVAL_S)):
                await asyncio.sleep(begin + number * _INTERVAL_S - time.perf_counter())
                prompts.append(group.create_task(self._prompt()))
            await asyncio.sleep(begin + DURATION_S - time.perf_counter())
            done_s = await asyncio.gather(*prompts)
            _cancel(streams)
        return decoding, begin, list(done_s)

    async def _streams_alone(self, first: int, last: int) -> float:
        """Tokens/s between the `first` and the `last` token of all streams."""
        decoding = Decoding()
        async with asyncio.TaskGroup() as group:
            streams = self._start_streams(group, decoding)
            await decoding.reach(last)
            _cancel(streams)
        return (last - first) / (decoding.time_of(last) - decoding.time_of(first))

    def _start_streams(self, group: asyncio.TaskGroup, decoding: Decoding) -> list[asyncio.Task[None]]:
        return [group.create_task(self._stream(number, decoding)) for number in range(NUM_STREAMS)]

    async def _stream(self, number: int, decoding: Decoding) -> None:
        """Decodes until it is cancelled, or the longest request is over."""
        request = self._request(STREAM_PROMPT, self._engine.model.max_model_len - STREAM_PROMPT)
        async with aclosing(self._engine.generate(request)) as outputs:
            async for output in outputs:
                decoding.add(number, len(output.token_ids))

    async def _prompt(self) -> float:
        """When the first token of a long prompt was there."""
        async for _ in self._engine.generate(self._request(PROMPT, 1)):
            pass
        return time.perf_counter()

    def _request(self, prompt_tokens: int, max_tokens: int) -> EngineRequest:
        vocab_size = self._engine.model.vocab_size
        prompt = tuple(self._draw.randrange(vocab_size) for _ in range(prompt_tokens))
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return EngineRequest(f"mixed-{next(self._numbers)}", prompt, sampling)


def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


def summarise(
    *, gaps_s: Sequence[float], decode_mixed: float, decode_alone: float, prefill_mixed: float, prefill_alone: float
) -> dict[str, float]:
    """`itl_p99_over_p50` and `share_of_alone` are what it comes to; rates are tokens/s.

    `share_of_alone` adds the share of its own rate that each load reaches in the mixture: 1 where they only divide
    the machine between them.
    """
    p50, p99 = percentile(gaps_s, 0.50), percentile(gaps_s, 0.99)
    return {
        "itl_p50_ms": 1e3 * p50,
        "itl_p99_ms": 1e3 * p99,
        "itl_p99_over_p50": p99 / p50,
        "decode_mixed_tokens_per_s": decode_mixed,
        "decode_alone_tokens_per_s": decode_alone,
        "prefill_mixed_tokens_per_s": prefill_mixed,
        "prefill_alone_tokens_per_s": prefill_alone,
        "share_of_alone": decode_mixed / decode_alone + prefill_mixed / prefill_alone,
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not exceed; there must be one."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
