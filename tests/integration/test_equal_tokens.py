"""The tokens of a request do not depend on where it is computed, over what its KV travels, or who runs beside it."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from engine.api import EngineRequest
from engine.config import EngineConfig
from engine.local_engine import LocalEngine
from kvstore.transfer.transports import TRANSPORTS
from pdmesh.sampling import SamplingParams
from tests import tiny_families
from tests.mesh import Mesh
from tests.tiny_models import EOS_TOKEN_ID, SHAPES, VOCAB_SIZE, make_tiny_model, write_tokenizer

NUM_TOKENS = 24
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 300, 400, 511, 600)

GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
SEEDED = SamplingParams(
    temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.2,
    frequency_penalty=0.1, seed=1234, max_tokens=NUM_TOKENS,
)  # fmt: skip


def prompts(vocab_size: int = VOCAB_SIZE - 64) -> list[tuple[int, ...]]:
    draw = random.Random(7)
    return [tuple(draw.randrange(vocab_size) for _ in range(length)) for length in LENGTHS]


@asynccontextmanager
async def running_engine(model: Path, kv_cache_dtype: str = "auto") -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(
        EngineConfig(model=str(model), dtype="float32", kv_cache_dtype=kv_cache_dtype, num_blocks=512, num_threads=1)
    )
    try:
        await engine.start(lambda done, total: None)
        yield engine
    finally:
        await engine.close()


async def aggregated(engine: LocalEngine, prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    """The request computed by one engine from prompt to end."""
    request = EngineRequest(f"alone-{random.random()}", tuple(prompt), sampling)
    async with aclosing(engine.generate(request)) as outputs:
        return [token async for output in outputs for token in output.token_ids]


# KV heads that are shared, other angles, one matrix for input and output.
MOST_OF_IT = ["gqa", "rope_llama3_tied"]


@pytest.mark.parametrize(
    "shape",
    [shape if shape in MOST_OF_IT else pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES],
)
async def test_disaggregated_equals_aggregated_equals_transformers(shape: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, shape)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    await _check_equal_tokens(model, reference, prompts())


async def test_with_kv_in_8_bits_disaggregated_equals_aggregated(tiny_model: Path) -> None:
    requests = [(prompt, sampling) for prompt in prompts()[::3] for sampling in (GREEDY, SEEDED)]
    async with running_engine(tiny_model, "int8") as engine:
        alone = [await aggregated(engine, prompt, sampling) for prompt, sampling in requests]
    async with running_engine(tiny_model) as engine:
        assert alone != [await aggregated(engine, prompt, sampling) for prompt, sampling in requests]
    short = {"short_prefill_tokens": 1}
    for transport in TRANSPORTS:
        kv = {"kv_cache_dtype": "int8"}
        async with Mesh(tiny_model, transports=transport, engine=kv, decode=short, router=short) as mesh:
            results = await asyncio.gather(
                *(mesh.client.generate(tokens=prompt, sampling=sampling) for prompt, sampling in requests)
            )
            assert [list(result.token_ids) for result in results] == alone
            assert transport in {result.report.kv_transport for result in results}
            await mesh.assert_idle()


# Of each family, the shape that has most of what its layers have and others have not.
TELLING = ["gemma3", "gpt2", "opt-post", "bloom-heads", "gpt-neox", "mixtral", "qwen3-moe-some"]


@pytest.mark.parametrize(
    "shape",
    [shape if shape in TELLING else pytest.param(shape, marks=pytest.mark.slow) for shape in tiny_families.SHAPES],
)
async def test_every_family(shape: str, tmp_path: Path) -> None:
    model = tiny_families.make_tiny_family(tmp_path, shape)
    write_tokenizer(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    few = [prompt for prompt in prompts() if len(prompt) in (1, 16, 33, 65, 200)]
    await _check_equal_tokens(model, reference, few, transports=["tcp"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_smollm2_disaggregated_equals_aggregated_equals_transformers(smollm2: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    await _check_equal_tokens(smollm2, reference, prompts(vocab_size=49152), eos_token_id=2)


async def _check_equal_tokens(
    model: Path,
    reference: torch.nn.Module,
    prompts: Sequence[tuple[int, ...]],
    eos_token_id: int = EOS_TOKEN_ID,
    transports: Iterable[str] = TRANSPORTS,
) -> None:
    """Every prompt, greedy and seeded, gets the same tokens in one engine and over every one of the transports."""
    greedy, seeded = (replace(sampling, stop_token_ids=(eos_token_id,)) for sampling in (GREEDY, SEEDED))
    async with running_engine(model) as engine:
        alone = {
            sampling: [await aggregated(engine, prompt, sampling) for prompt in prompts]
            for sampling in (greedy, seeded)
        }
    for prompt, tokens in zip(prompts, alone[greedy], strict=True):
        assert tokens == _transformers_greedy(reference, prompt), f"prompt of {len(prompt)} tokens"
    short = {"short_prefill_tokens": 1}
    for transport in transports:
        async with Mesh(model, transports=transport, decode=short, router=short) as mesh:
            for sampling, expected in alone.items():
                for prompt, tokens in zip(prompts, expected, strict=True):
                    result = await mesh.client.generate(tokens=prompt, sampling=sampling)
                    assert list(result.token_ids) == tokens, f"{transport}, prompt of {len(prompt)} tokens"
                    assert result.report.kv_transport in (transport, "")
                    if sampling is greedy and len(prompt) > 1:
                        assert result.report.kv_transport == transport
                        assert result.report.prefill_worker_id == "prefill-0"
            await mesh.assert_idle()


def _transformers_greedy(reference: torch.nn.Module, prompt: Sequence[int]) -> list[int]:
    output = reference.generate(  # type: ignore[operator]
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=NUM_TOKENS,
        do_sample=False, pad_token_id=EOS_TOKEN_ID,
    )  # fmt: skip
    return [int(token) for token in output[0, len(prompt) :]]


async def test_concurrent_streams_get_what_each_gets_alone(tiny_model: Path) -> None:
    draw = random.Random(3)
    requests = []
    for number in range(64):
        prompt = tuple(draw.randrange(VOCAB_SIZE - 64) for _ in range(draw.choice((1, 9, 40, 130, 400))))
        sampling = SamplingParams(
            temperature=draw.choice((0.0, 0.8)), seed=number, max_tokens=draw.choice((1, 8, 120)), top_p=0.9,
            stop_token_ids=(EOS_TOKEN_ID,),
        )  # fmt: skip
        requests.append((prompt, sampling))
    async with running_engine(tiny_model) as engine:
        alone = [await aggregated(engine, prompt, sampling) for prompt, sampling in requests]
    # 40 blocks of 16 tokens for up to 64 requests of up to 520: they queue, and preempt each other while decoding.
    async with Mesh(tiny_model, num_prefill=2, num_decode=2, engine={"num_blocks": 40}) as mesh:
        results = await asyncio.gather(
            *(mesh.client.generate(tokens=prompt, sampling=sampling) for prompt, sampling in requests)
        )
        assert [list(result.token_ids) for result in results] == alone
        assert {result.report.decode_worker_id for result in results} == {"decode-0", "decode-1"}
        assert {"prefill-0", "prefill-1"} <= {result.report.prefill_worker_id for result in results}
        await mesh.assert_idle()
