"""Clients that send known requests over and over: some leave in the middle, the others check what they got."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from engine.api import EngineRequest
from engine.config import EngineConfig
from engine.local_engine import LocalEngine
from pdmesh import AsyncClient
from pdmesh.errors import MeshError
from pdmesh.generation import Chunk, Complete
from pdmesh.sampling import SamplingParams
from tests.tiny_models import VOCAB_SIZE

# In which any request must have ended, one way or the other: what comes after counts as a hang.
REQUEST_TIMEOUT_S = 60.0
# Of all clients; how long they stay is drawn, and some of them get their answers first.
_LEAVING = 0.25
_LONGEST_STAY_S = 1.0


@dataclass(frozen=True, slots=True)
class KnownRequest:
    """A request, and what one engine alone answers to it."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    token_ids: tuple[int, ...]


async def known_requests(model: Path, num_prompts: int, draw: random.Random) -> list[KnownRequest]:
    """Greedy and seeded ones with prompts of 1 to 500 tokens, answered by an engine in this process."""
    engine = LocalEngine(EngineConfig(model=str(model), dtype="float32", num_blocks=512, num_threads=1))
    await engine.start(lambda done, total: None)
    try:
        found: list[KnownRequest] = []
        for number in range(num_prompts):
            prompt = tuple(draw.randrange(VOCAB_SIZE - 64) for _ in range(draw.randint(1, 500)))
            for temperature in (0.0, 0.9):
                sampling = SamplingParams(
                    temperature=temperature, seed=number, max_tokens=draw.randint(1, 500), ignore_eos=True
                )
                async with aclosing(engine.generate(EngineRequest(f"alone-{len(found)}", prompt, sampling))) as outputs:
                    token_ids = tuple([token async for output in outputs for token in output.token_ids])
                found.append(KnownRequest(prompt, sampling, token_ids))
        return found
    finally:
        await engine.close()


@dataclass(slots=True)
class Outcomes:
    """How requests ended.

    Attributes:
        num_answered: With all tokens.
        num_left: The client left before the end.
        failed: By the reason stated.
        transports: Over which the KV of answered requests came; "" where the decode worker computed it.
        num_resumes, num_retries: Of answered requests: decode workers lost, and prefill workers that failed.
    """

    num_answered: int = 0
    num_left: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    transports: Counter[str] = field(default_factory=Counter)
    num_resumes: int = 0
    num_retries: int = 0

    @property
    def num_ended(self) -> int:
        return self.num_answered + self.num_left + self.failed.total()


class Clients:
    """`num_clients` at a time send `num_requests` of `known`; the outcomes grow meanwhile."""

    def __init__(self, client: AsyncClient, known: Sequence[KnownRequest], draw: random.Random) -> None:
        self._client = client
        self._known = known
        self._draw = draw
        self.outcomes = Outcomes()

    async def run(self, num_requests: int, num_clients: int) -> None:
        """Raises AssertionError at the first wrong token, or a stream that ends without an end."""
        numbers = iter(range(num_requests))

        async def one() -> None:
            for _ in numbers:
                await self._ask()

        async with asyncio.TaskGroup() as clients:
            for _ in range(num_clients):
                clients.create_task(one())

    async def _ask(self) -> None:
        known = self._draw.choice(self._known)
        # With a salt of its own a prompt is computed anew, and its KV moves.
        salt = str(self._draw.random()) if self._draw.random() < 0.5 else ""
        stay_s = self._draw.uniform(0, _LONGEST_STAY_S) if self._draw.random() < _LEAVING else None
        seen: list[int] = []
        try:
            async with asyncio.timeout(stay_s):
                complete = await self._stream(known, salt, seen)
        except TimeoutError:
            self.outcomes.num_left += 1
        except MeshError as error:
            self.outcomes.failed[error.reason] += 1
        else:
            assert tuple(seen) == known.token_ids, f"{complete.report} has other tokens than the engine alone"
            assert complete.usage.completion_tokens == len(seen)
            report = complete.report
            self.outcomes.num_answered += 1
            self.outcomes.transports[report.kv_transport] += 1
            self.outcomes.num_resumes += report.decode_resumes
            self.outcomes.num_retries += report.prefill_retries
        assert tuple(seen) == known.token_ids[: len(seen)], "what was delivered before the end was right"

    async def _stream(self, known: KnownRequest, salt: str, seen: list[int]) -> Complete:
        """Adds the tokens to `seen` as they come."""
        stream = self._client.stream(
            tokens=known.prompt, sampling=known.sampling, cache_salt=salt, timeout_s=REQUEST_TIMEOUT_S
        )
        async with aclosing(stream) as events:
            async for event in events:
                if isinstance(event, Chunk):
                    assert event.first_token_index == len(seen) or not event.token_ids, "no token twice, none lost"
                    seen += event.token_ids
                elif isinstance(event, Complete):
                    return event
        raise AssertionError("the stream ended without an end or an error")
