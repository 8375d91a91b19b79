"""However many ranks share a model on either side, the same request gets the same tokens, and its KV travels once.

Every mesh answers the same requests, one after the other: their prompts share beginnings, so that the decode worker
holds a part of most of them. Then all of them at once, each with nothing cached.
"""

import asyncio
import json
import random
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pdmesh.generation import GenerationResult
from pdmesh.sampling import SamplingParams
from pdmesh.transfers import Direction
from tests.processes import ProcessMesh
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

BLOCK_SIZE = 16
NUM_TOKENS = 24
# float32, all layers and KV heads: of "many_heads" and of "gqa" in tests/tiny_models.py.
BLOCK_BYTES = {"many_heads": 3 * 2 * 6 * 16 * BLOCK_SIZE * 4, "gqa": 3 * 2 * 2 * 16 * BLOCK_SIZE * 4}

GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SEEDED = SamplingParams(
    temperature=0.9, top_p=0.95, top_k=50, repetition_penalty=1.1, seed=1234, max_tokens=NUM_TOKENS, ignore_eos=True
)


@dataclass(frozen=True)
class Case:
    """Degrees of both sides as flags, the model, and what the KV travels over."""

    prefill: str
    decode: str
    transport: str
    shape: str = "many_heads"

    def __str__(self) -> str:
        return f"{self.prefill or '1'}->{self.decode or '1'} {self.transport} {self.shape}".replace("--", "")


PAIRS = [
    ("", "--tp 2", "many_heads"),
    ("--tp 2", "", "many_heads"),
    ("--tp 2", "--tp 3", "many_heads"),
    ("--tp 4", "--tp 2", "many_heads"),
    # Two KV heads: each is held by two ranks.
    ("", "--tp 4", "gqa"),
    ("--pp 2", "", "many_heads"),
    ("", "--pp 2", "many_heads"),
    ("--tp 2 --pp 2", "--tp 2 --pp 2", "many_heads"),
]
# One is enough of a warning; all of them are slow.
QUICK = [Case("--tp 2", "--tp 3", "tcp")]
CASES = [Case(*pair[:2], transport, pair[2]) for pair in PAIRS for transport in ("shm", "tcp", "grpc")]
PARAMS = [pytest.param(case, id=str(case), marks=() if case in QUICK else pytest.mark.slow) for case in CASES]


@dataclass
class Held:
    """What a decode worker has cached, reckoned from what it was asked before."""

    prefixes: set[tuple[int, ...]] = field(default_factory=set)

    def num_lacking(self, prompt: Sequence[int]) -> int:
        """Blocks of a prompt that it has not."""
        num_blocks = -(-len(prompt) // BLOCK_SIZE)
        # The last token is computed in any case.
        for number in range((len(prompt) - 1) // BLOCK_SIZE):
            if tuple(prompt[: (number + 1) * BLOCK_SIZE]) not in self.prefixes:
                return num_blocks - number
        return num_blocks - (len(prompt) - 1) // BLOCK_SIZE

    def add(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        # The last token was never computed with.
        tokens = (*prompt, *output[:-1])
        self.prefixes |= {tokens[:end] for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE)}


@dataclass(frozen=True)
class Answers:
    """What a mesh answered one after the other, and all at once."""

    alone: list[tuple[int, ...]]
    together: list[tuple[int, ...]]


def _prompts() -> list[tuple[tuple[int, ...], SamplingParams]]:
    draw = random.Random(5)
    one, other = ([draw.randrange(VOCAB_SIZE - 64) for _ in range(400)] for _ in range(2))
    return [
        (tuple(one[:50]), GREEDY),
        (tuple(one[:200]), GREEDY),
        # All but half a block is cached.
        (tuple(one[:200]), SEEDED),
        (tuple(one[:100] + other[:233]), SEEDED),
        (tuple(other[:257]), GREEDY),
        # One whole block.
        (tuple(draw.randrange(VOCAB_SIZE - 64) for _ in range(BLOCK_SIZE)), SEEDED),
        (tuple(one[:100] + other[:300]), GREEDY),
    ]


async def _ask(mesh: ProcessMesh, tokens: Sequence[int], sampling: SamplingParams, salt: str = "") -> GenerationResult:
    return await mesh.client.generate(tokens=tokens, sampling=sampling, cache_salt=salt, timeout_s=60)


async def _answers(case: Case, model: Path, run_dir: Path) -> Answers:
    """Asks a mesh of these degrees everything, and checks what travelled on the way."""
    block_bytes = BLOCK_BYTES[case.shape]
    short = ("--short-prefill-tokens", "4")
    async with ProcessMesh(
        model,
        run_dir,
        prefill_flags=case.prefill.split(),
        decode_flags=(*case.decode.split(), *short, "--transports", case.transport),
        router_flags=short,
    ) as mesh:
        held, moved = Held(), 0
        alone = []
        for number, (tokens, sampling) in enumerate(_prompts()):
            num_lacking = held.num_lacking(tokens)
            result = await _ask(mesh, tokens, sampling)
            assert result.report.kv_transport == case.transport, f"request {number} did not travel"
            assert result.report.kv_bytes == num_lacking * block_bytes, f"request {number}: not {num_lacking} blocks"
            moved += result.report.kv_bytes
            held.add(tokens, result.token_ids)
            alone.append(result.token_ids)
        results = await asyncio.gather(
            *(_ask(mesh, *request, f"{number}") for number, request in enumerate(_prompts()))
        )
        for (tokens, _), result in zip(_prompts(), results, strict=True):
            assert result.report.kv_bytes == -(-len(tokens) // BLOCK_SIZE) * block_bytes
            moved += result.report.kv_bytes
        await mesh.assert_idle()
        await _check_journals(mesh, moved)
        return Answers(alone, [result.token_ids for result in results])


async def _check_journals(mesh: ProcessMesh, num_bytes: int) -> None:
    """`pdmesh transfers` of both sides: the decode worker got so much, which is what the prefill worker sent."""
    command = (sys.executable, "-m", "pdmesh.cli.main", "transfers", "--json", "--address", mesh.address)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    done = {
        (worker["worker_id"], total["direction"]): total["num_bytes"]
        for worker in json.loads(output)["workers"]
        for total in worker["report"]["totals"]
    }
    assert done["decode-0", Direction.RECEIVING.value] == done["prefill-0", Direction.SENDING.value] == num_bytes
    # What the prefill worker fetched of what the decode worker had.
    assert done.get(("prefill-0", "receiving"), 0) == done.get(("decode-0", "sending"), 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {shape: make_tiny_model(tmp_path_factory.mktemp(shape), shape) for shape in BLOCK_BYTES}


@pytest.fixture(scope="module")
def expected(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Coroutine[None, None, Answers]]:
    """Of a shape: from one rank to one rank."""
    known: dict[str, Answers] = {}

    async def of_shape(shape: str) -> Answers:
        if shape not in known:
            alone = Case("", "", "shm", shape)
            known[shape] = await _answers(alone, models[shape], tmp_path_factory.mktemp("alone"))
        return known[shape]

    return of_shape


@pytest.mark.parametrize("case", PARAMS)
async def test_ranks_on_either_side_change_no_token(
    case: Case, models: dict[str, Path], expected: Callable[[str], Coroutine[None, None, Answers]], tmp_path: Path
) -> None:
    assert await _answers(case, models[case.shape], tmp_path) == await expected(case.shape)


@pytest.mark.slow
async def test_groups_that_differ_in_block_size_are_not_paired(models: dict[str, Path], tmp_path: Path) -> None:
    async with ProcessMesh(models["many_heads"], tmp_path, decode_flags=("--tp", "2")) as mesh:
        other = mesh.add_worker("prefill", "--tp", "2", "--block-size", "32")
        await other.start()

        async def is_excluded() -> bool:
            view = (await mesh.workers()).get("prefill-1")
            return view is not None and "block_size" in view.excluded_because

        await mesh.until(is_excluded, "the router refuses to pair them", 40)
        views = await mesh.workers()
        assert views["prefill-1"].excluded_because == ("can pair with no decode worker: block_size: 32 here, 16 there")
        assert not views["prefill-0"].excluded_because
        results = await asyncio.gather(
            *(_ask(mesh, tuple(range(number, number + 150)), GREEDY, f"{number}") for number in range(6))
        )
        assert {result.report.prefill_worker_id for result in results} == {"prefill-0"}
        await mesh.assert_idle()
