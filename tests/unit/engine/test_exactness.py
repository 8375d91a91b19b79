"""A request's tokens are its own: however prompts are cut, whatever is cached, whoever runs beside.

On the C++ kernels and on plain torch alike, against each request computed alone by plain torch, its prompt in one step.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.api import EngineRequest
from engine.assembly import assemble
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.loader import load_model
from engine.request import Request
from pdmesh.sampling import SamplingParams
from tests.tiny_models import make_tiny_model

NUM_TOKENS = 12
BLOCK_SIZE = 16
MAX_MODEL_LEN = 320
SHAPES = ["gqa", "mha_tied", "mqa_wide_head"]


def _prompts() -> list[tuple[int, ...]]:
    """Of many lengths; the second half begin as another does, and find its blocks cached where it came first."""
    draw = random.Random(3)
    own = [tuple(draw.randrange(256) for _ in range(length)) for length in (1, 15, 16, 33, 100, 129, 300)]
    shared = [(*own[5][:kept], *(draw.randrange(256) for _ in range(added))) for kept, added in ((16, 1), (100, 30))]
    return [*own, *shared, own[4][:49]]


PROMPTS = _prompts()
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.9, seed=11, max_tokens=NUM_TOKENS, ignore_eos=True)


@dataclass(frozen=True)
class Scenario:
    """Requests, by prompt and kind, each arriving some steps after the one before; and the engine they meet."""

    arrivals: list[tuple[int, bool, int]]
    chunk: int
    num_seqs: int
    num_blocks: int


SCENARIOS = st.builds(
    Scenario,
    arrivals=st.lists(
        st.tuples(st.integers(0, len(PROMPTS) - 1), st.booleans(), st.integers(0, 4)), min_size=1, max_size=8
    ),
    chunk=st.sampled_from([1, 7, 64, 512]),
    num_seqs=st.integers(1, 6),
    # From the longest request alone, where the others are preempted, to all at once.
    num_blocks=st.sampled_from([20, 26, 40, 200]),
)


def core(
    model: Path,
    kernels: str,
    *,
    kv_cache_dtype: str = "auto",
    chunk: int = 512,
    num_seqs: int = 6,
    num_blocks: int = 200,
) -> EngineCore:
    config = EngineConfig(
        model=str(model),
        device="cpu",
        dtype="float32",
        kernels=kernels,
        block_size=BLOCK_SIZE,
        kv_cache_dtype=kv_cache_dtype,
        num_blocks=num_blocks,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=num_seqs,
        max_prefill_chunk=chunk,
    )
    return assemble(config, load_model, lambda done, total: None).core


def request(prompt: int, seeded: bool) -> Request:
    return Request(EngineRequest("r", PROMPTS[prompt], SEEDED if seeded else GREEDY))


def run_alone(engine: EngineCore, alone: Request) -> list[int]:
    engine.scheduler.add(alone)
    while not alone.finished:
        engine.step()
    return alone.token_ids


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[tuple[int, bool], list[int]]]]:
    """Of a shape: its directory, and every request's tokens when plain torch computes it alone."""
    made: dict[str, tuple[Path, dict[tuple[int, bool], list[int]]]] = {}

    def model(shape: str) -> tuple[Path, dict[tuple[int, bool], list[int]]]:
        if shape not in made:
            directory = make_tiny_model(tmp_path_factory.mktemp(shape), shape)
            kinds = [(prompt, seeded) for prompt in range(len(PROMPTS)) for seeded in (False, True)]
            made[shape] = directory, {kind: run_alone(core(directory, "torch"), request(*kind)) for kind in kinds}
        return made[shape]

    return model


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        *((shape, "auto") for shape in SHAPES),
        *(pytest.param(shape, "torch", marks=() if shape == "gqa" else pytest.mark.slow) for shape in SHAPES),
    ],
)
def test_tokens_are_those_of_the_request_alone(
    models: Callable[[str], tuple[Path, dict[tuple[int, bool], list[int]]]], shape: str, kernels: str
) -> None:
    _check(*models(shape), kernels)


def test_tokens_are_those_of_the_request_alone_with_kv_in_8_bits(tmp_path: Path) -> None:
    """On the kernels: what torch rounds otherwise in another batch, 8 bits may round to the next step."""
    directory = make_tiny_model(tmp_path, "gqa")
    kinds = [(prompt, seeded) for prompt in range(len(PROMPTS)) for seeded in (False, True)]
    alone = {kind: run_alone(core(directory, "auto", kv_cache_dtype="int8"), request(*kind)) for kind in kinds}
    _check(directory, alone, "auto", "int8")


def _check(
    directory: Path, expected: dict[tuple[int, bool], list[int]], kernels: str, kv_cache_dtype: str = "auto"
) -> None:
    @settings(max_examples=20, deadline=None)
    @given(SCENARIOS)
    def check(scenario: Scenario) -> None:
        engine = core(
            directory,
            kernels,
            kv_cache_dtype=kv_cache_dtype,
            chunk=scenario.chunk,
            num_seqs=scenario.num_seqs,
            num_blocks=scenario.num_blocks,
        )
        requests = []
        for prompt, seeded, num_steps in scenario.arrivals:
            for _ in range(num_steps):
                engine.step()
            requests.append(request(prompt, seeded))
            engine.scheduler.add(requests[-1])
        while any(not r.finished for r in requests):
            engine.step()
        if any(r.num_preemptions for r in requests):
            event("preempted")
        if any(r.num_cached_tokens for r in requests):
            event("found its prefix cached")
        for (prompt, seeded, _), r in zip(scenario.arrivals, requests, strict=True):
            assert r.token_ids == expected[prompt, seeded]

    check()
