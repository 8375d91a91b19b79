"""A real model in the engine: a request's tokens do not depend on what else runs, on preemption or on the cache."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.api import EngineRequest
from engine.assembly import Assembly, assemble
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.loader import load_model
from engine.request import Request
from pdmesh.sampling import SamplingParams

PROMPT = tuple(7 * i % 300 for i in range(45))
MAX_TOKENS = 30

SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS),
    "seeded": SamplingParams(temperature=1.0, seed=5, max_tokens=MAX_TOKENS),
    "truncated": SamplingParams(
        temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.2, seed=6, max_tokens=MAX_TOKENS
    ),
}


def core(model: Path, num_blocks: int = 64) -> EngineCore:
    config = EngineConfig(
        model=str(model),
        device="cpu",
        dtype="float32",
        block_size=4,
        num_blocks=num_blocks,
        max_model_len=80,
        max_num_seqs=6,
        max_num_batched_tokens=40,
        max_prefill_chunk=24,
    )
    return assemble(config, load_model, lambda done, total: None).core


def test_kv_in_8_bits_takes_fewer_bytes_and_pairs_with_its_own_kind(tiny_model: Path) -> None:
    def assembled(kv_cache_dtype: str) -> Assembly:
        config = EngineConfig(
            model=str(tiny_model), device="cpu", dtype="float32", kv_cache_dtype=kv_cache_dtype, kv_cache_bytes=1 << 20
        )
        return assemble(config, load_model, lambda done, total: None)

    wide, narrow = assembled("auto"), assembled("int8")
    head_dim = wide.facts.head_dim
    assert narrow.memory.block_bytes * 4 * head_dim == wide.memory.block_bytes * (head_dim + 4)
    assert narrow.core.status().num_blocks == (1 << 20) // narrow.memory.block_bytes
    assert narrow.facts.mismatch(wide.facts).startswith("kv_dtype: int8 here, float32 there")
    assert not narrow.facts.mismatch(assembled("int8").facts)


def request(sampling: SamplingParams, prompt: Sequence[int] = PROMPT, priority: int = 0) -> Request:
    return Request(EngineRequest("r", tuple(prompt), sampling, priority=priority))


def run(engine: EngineCore, requests: Sequence[Request]) -> None:
    for r in requests:
        engine.scheduler.add(r)
    while any(not r.finished for r in requests):
        engine.step()
        engine.scheduler.check_invariants()
    assert engine.status().num_free_blocks == engine.status().num_blocks


def others() -> list[Request]:
    """Of other lengths and kinds, some of them with the same beginning."""
    return [
        request(SamplingParams(temperature=0.0, max_tokens=20), PROMPT[:20]),
        request(SamplingParams(temperature=1.3, seed=1, max_tokens=9), [5]),
        request(SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=1), range(100, 133)),
        request(SamplingParams(temperature=0.5, min_p=0.1, frequency_penalty=0.5, max_tokens=30), range(200, 211)),
    ]


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING.keys())
def test_the_same_tokens_whatever_happens_around_a_request(tiny_model: Path, sampling: SamplingParams) -> None:
    alone = request(sampling)
    run(core(tiny_model), [alone])
    assert len(set(alone.token_ids[45:])) > 3

    mixed = request(sampling)
    run(core(tiny_model), [*others(), mixed])
    assert mixed.token_ids == alone.token_ids

    # 20 blocks hold 80 tokens: three requests of 75 take their blocks from the one that comes last.
    crowded = [request(sampling, priority=1), request(sampling, PROMPT[:10], priority=1), request(sampling)]
    run(core(tiny_model, num_blocks=20), crowded)
    assert crowded[2].num_preemptions > 0
    assert crowded[2].token_ids == crowded[0].token_ids == alone.token_ids

    cached = core(tiny_model)
    run(cached, [request(sampling)])
    again = request(sampling)
    run(cached, [again])
    assert again.num_cached_tokens == 44
    assert again.token_ids == alone.token_ids

    # Another attempt, after 11 tokens that an earlier one delivered.
    resumed = Request(EngineRequest("r", PROMPT, sampling, output_token_ids=tuple(alone.token_ids[45:56])))
    run(core(tiny_model), [resumed])
    assert resumed.token_ids == alone.token_ids
