"""Our engine under the bench's protocol, as users get it: LocalEngine, its thread and its event loop."""

import asyncio
import itertools
import time
from contextlib import aclosing

import torch

from bench.engine.peers.adapter import LoadRequest, Sequence, serve
from engine.api import EngineRequest
from engine.config import EngineConfig
from engine.local_engine import LocalEngine
from pdmesh.sampling import SamplingParams

# A GPU is shared with the peers; by default most of what is free would be ours.
_CUDA_CACHE_BYTES = 8 << 30


class Ours:
    def __init__(self, request: LoadRequest) -> None:
        on_cpu = request.device == "cpu"
        config = EngineConfig(
            model=request.model,
            dtype=request.dtype,
            device=request.device,
            num_threads=request.threads if on_cpu else None,
            kv_cache_bytes=None if on_cpu else _CUDA_CACHE_BYTES,
        )
        self._engine = LocalEngine(config)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._engine.start(lambda done, total: None))
        self._numbers = itertools.count()
        self.version = f"pdmesh, torch {torch.__version__}"

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Sequence]:
        return self._loop.run_until_complete(self._generate(prompts, num_tokens))

    async def _generate(self, prompts: list[list[int]], num_tokens: int) -> list[Sequence]:
        """Prompts are computed a few at a time, while those before them decode: more tokens than `num_tokens` are
        asked for, and each sequence goes on until it has so many since the last one began."""
        max_tokens = num_tokens
        if len(prompts) > 1:
            max_tokens = self._engine.model.max_model_len - max(map(len, prompts))
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        sequences: list[Sequence] = []
        began = time.perf_counter()

        async def follow(prompt: list[int]) -> Sequence:
            sequence: Sequence | None = None
            num_together = 0
            request = EngineRequest(f"bench-{next(self._numbers)}", tuple(prompt), sampling)
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    if sequence is None:
                        sequence = Sequence(output.token_ids[0], [])
                        sequences.append(sequence)
                    sequence.arrivals_s.extend([time.perf_counter() - began] * len(output.token_ids))
                    if len(sequences) == len(prompts):
                        num_together += len(output.token_ids)
                    if num_together >= num_tokens:
                        break
            assert sequence is not None, "a stream ended without a token"
            return sequence

        return await asyncio.gather(*map(follow, prompts))


if __name__ == "__main__":
    serve(Ours)
