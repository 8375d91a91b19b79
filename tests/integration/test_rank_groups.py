"""Ranks that compute a model together give the tokens of one rank alone, whatever happens around a request."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests import tiny_families, tiny_llamas, tiny_models
from tests.rank_groups import Answer, alone, arrivals, assert_same, config, group_of_ranks, serve

GROUPS = [(2, 1), (4, 1), (1, 2), (2, 2), (1, 3)]
KERNELS = ["auto", "torch"]
CHUNKS = [1, 7, 64, 512]
# Texts of "bloom" run in circles; "bloom-heads" is like it, but for its output matrix.
SHAPES = [*tiny_llamas.SHAPES, *tiny_models.SHAPES, *(shape for shape in tiny_families.SHAPES if shape != "bloom")]
# Two layers, and two heads.
TOO_MANY = [("opt-post", (1, 3)), ("gpt-neox-sequential", (4, 1))]


@dataclass(frozen=True)
class Case:
    """A group and its model. Only steps of at least 128 tokens are cut into micro-batches: with whole prompts."""

    shape: str
    tp: int = 1
    pp: int = 1
    kernels: str = "auto"
    chunk: int = 512
    weights: str = "packed"

    def __str__(self) -> str:
        return f"{self.shape}-tp{self.tp}-pp{self.pp}-{self.kernels}-{self.weights}-chunk{self.chunk}"


# Every way to split and to compute, and every chunk.
FEW = [
    Case("gqa", tp=2, chunk=7),
    Case("mqa-tied", tp=4, chunk=64),
    Case("rope-llama3", pp=3),
    Case("biases", tp=2, pp=2),
    # Heads that the kernels do not serve: plain torch, over shared memory.
    Case("wide-heads", tp=2, chunk=1),
    Case("mha", pp=2, kernels="torch"),
    # Of some matrices a rank's part is columns: rows of the file with others' between them.
    Case("gqa", tp=2, chunk=64, weights="mapped"),
    Case("mixtral", tp=2, weights="mapped"),
]
ALL = [
    Case(shape, tp, pp, kernels, CHUNKS[number % len(CHUNKS)])
    for number, (shape, (tp, pp), kernels) in enumerate(itertools.product(SHAPES, GROUPS, KERNELS))
    if (shape, (tp, pp)) not in TOO_MANY
]
# What layers of families have that Llama's have not, and that is split.
OF_FAMILIES = [
    Case("phi3-partial", tp=2, chunk=64),
    Case("gemma3", pp=2, chunk=7),
    Case("gpt2", tp=2, chunk=64),
    Case("opt-post", tp=2, chunk=64),
    Case("bloom-heads", tp=2, chunk=64),
    Case("gpt-neox", tp=2, chunk=64),
    Case("qwen3-moe-some", pp=2),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Answer]]]:
    """Of a shape: a model, and what one rank answers to each of `arrivals` by itself."""
    made: dict[str, tuple[Path, list[Answer]]] = {}

    def of_shape(shape: str) -> tuple[Path, list[Answer]]:
        if shape not in made:
            directory = tmp_path_factory.mktemp("models") / shape
            if shape in tiny_families.SHAPES:
                tiny_families.make_tiny_family(directory, shape)
            elif shape in tiny_llamas.SHAPES:
                tiny_llamas.make_tiny_llama(directory, shape)
            else:
                tiny_models.make_tiny_model(directory, shape)
            made[shape] = directory, alone(config(directory, kernels="torch", num_blocks=200), arrivals())
        return made[shape]

    return of_shape


@pytest.mark.parametrize("case", [*FEW, *OF_FAMILIES], ids=str)
def test_tokens_are_those_of_one_rank(model: Callable[[str], tuple[Path, list[Answer]]], case: Case) -> None:
    _check(model, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_tokens_are_those_of_one_rank_however_split(
    model: Callable[[str], tuple[Path, list[Answer]]], case: Case
) -> None:
    _check(model, case)


def _check(model: Callable[[str], tuple[Path, list[Answer]]], case: Case) -> None:
    directory, expected = model(case.shape)
    # A text that repeats itself would hide what is wrong with it.
    assert all(len(set(answer.token_ids)) > 0.5 * len(answer.token_ids) for answer in expected)
    of = config(directory, kernels=case.kernels, chunk=case.chunk, weights=case.weights)
    with group_of_ranks(of, tp=case.tp, pp=case.pp) as assembly:
        assert [rank.rank for rank in assembly.ranks] == list(range(case.tp * case.pp))
        answers, requests = serve(assembly.core, arrivals())
    assert any(request.num_preemptions for request in requests)
    assert any(request.num_cached_tokens for request in requests)
    assert_same(answers, expected)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_kv_in_8_bits(model: Callable[[str], tuple[Path, list[Answer]]], tp: int, pp: int) -> None:
    directory, _ = model("gqa")
    of = config(directory, kv_cache_dtype="int8")
    expected = alone(replace(of, num_blocks=200), arrivals())
    with group_of_ranks(of, tp=tp, pp=pp) as assembly:
        assert assembly.facts.kv_dtype == "int8"
        answers, requests = serve(assembly.core, arrivals())
    assert any(request.num_preemptions for request in requests)
    # Ranks add up in another order than one: 8 bits then round a value here and there to the next step.
    if pp == 1:
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    else:
        assert_same(answers, expected)


@pytest.mark.parametrize(("kernels", "tp", "pp"), [("auto", 2, 1), ("torch", 1, 2)])
def test_weights_that_wait_on_disk(
    model: Callable[[str], tuple[Path, list[Answer]]], tmp_path: Path, kernels: str, tp: int, pp: int
) -> None:
    directory, expected = model("gqa")
    first = {"model.layers.0": "disk", "model.layers.1": "disk"} if pp == 1 else {"model.layers": "disk"}
    (tmp_path / "map.json").write_text(json.dumps(first))
    of = config(directory, kernels=kernels, device_map=str(tmp_path / "map.json"), offload_dir=str(tmp_path))
    with group_of_ranks(of, tp=tp, pp=pp) as assembly:
        answers, _ = serve(assembly.core, arrivals())
    assert_same(answers, expected)


@pytest.mark.parametrize(("kernels", "pp"), [("auto", 1), pytest.param("torch", 2, marks=pytest.mark.slow)])
def test_bfloat16(model: Callable[[str], tuple[Path, list[Answer]]], kernels: str, pp: int) -> None:
    # Sums of bfloat16 products are rounded elsewhere than in one rank: tokens may differ.
    directory, _ = model("gqa")
    with group_of_ranks(config(directory, dtype="bfloat16", kernels=kernels), tp=2, pp=pp) as assembly:
        answers, _ = serve(assembly.core, arrivals())
    for arrival, answer in zip(arrivals(), answers, strict=True):
        assert len(answer.token_ids) == arrival.sampling.max_tokens


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2(smollm2: Path) -> None:
    """Nine heads over three KV heads: a third each, or two thirds and one."""
    arriving = arrivals(vocab_size=49152)
    expected = alone(config(smollm2, num_blocks=200), arriving)
    for tp in (2, 3):
        with group_of_ranks(config(smollm2, chunk=64), tp=tp) as assembly:
            answers, _ = serve(assembly.core, arriving)
        assert_same(answers, expected)
