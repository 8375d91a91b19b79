"""The CPU kernels give the logits of transformers, and of a row the same bits whatever is computed beside it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cpu.build import X86_TARGETS, BuildError, Target, kernels_path, this_target
from engine.cpu.executor import CpuExecutor
from engine.cpu.library import Kernels
from engine.executor import ModelExecutor
from engine.kv_cache import KVCache, KVLayout
from engine.kv_int8 import dequantize, quantize
from engine.loader import LoadedModel
from tests.texts import Texts, assert_same_logits, load, packed_for, random_text, reference_logits

SHAPES = ["gqa", "mha", "mqa-tied", "biases", "rope-linear", "rope-llama3", "rope-yarn"]
# The best of this machine, and those below it: what it computes, lesser machines compute with.
try:
    TARGETS = X86_TARGETS[X86_TARGETS.index(this_target()) :]
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)
PACK = {"float32": 1, "bfloat16": 2}
# What the model computes in, and whether its K and V are stored in 8 bits.
STORED = pytest.mark.parametrize(
    ("dtype", "int8"),
    [("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True)],
    ids=["float32", "bfloat16", "float32-int8", "bfloat16-int8"],
)


def texts_on_kernels(
    directory: Path,
    texts: Sequence[Sequence[int]],
    *,
    dtype: str = "float32",
    int8: bool = False,
    block_size: int = 16,
    target: Target | None = None,
    num_threads: int = 2,
    region: bool = False,
) -> Texts:
    def make_executor(loaded: LoadedModel, kv_cache: KVCache) -> ModelExecutor:
        kernels = Kernels(kernels_path(target or this_target()), kv_cache.dtype)
        return CpuExecutor(
            kernels,
            loaded,
            packed_for(loaded, kernels, num_threads),
            kv_cache,
            max_tokens=512,
            max_position=256,
            num_threads=num_threads,
        )

    return Texts(
        load(directory, dtype, stored=True),
        texts,
        block_size=block_size,
        layout=KVLayout(2 if int8 else PACK[dtype]),
        int8=int8,
        region=region,
        make_executor=make_executor,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 150])
def test_chunked_prefill_equals_transformers(tiny_llama: Callable[[str], Path], shape: str, chunk: int) -> None:
    directory = tiny_llama(shape)
    text = random_text(150)
    texts = texts_on_kernels(directory, [text])
    for begin in range(0, len(text), chunk):
        texts.step({0: min(chunk, len(text) - begin)})
    assert_same_logits(texts.logits_of(0), reference_logits(directory, text))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", PACK)
def test_every_processor_computes_the_same_model(tiny_llama: Callable[[str], Path], target: Target, dtype: str) -> None:
    directory = tiny_llama("biases")
    # 13 and 25 rows: more than one tile of rows, of uneven size.
    text = random_text(13 + 25 + 1)
    expected = reference_logits(directory, text)
    ours, plain = texts_on_kernels(directory, [text], dtype=dtype, target=target), Texts(load(directory, dtype), [text])
    for texts in (ours, plain):
        texts.step({0: 13})
        texts.step({0: 25})
        texts.step({0: 1})
    if dtype == "float32":
        assert_same_logits(ours.logits_of(0), expected)
    else:
        # As near as torch comes with the same weights.
        assert _error(ours.logits_of(0), expected) < 1.2 * _error(plain.logits_of(0), expected)


@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_blocks_of_any_multiple_of_sixteen(tiny_llama: Callable[[str], Path], block_size: int) -> None:
    directory = tiny_llama("gqa")
    text = random_text(150)
    texts = texts_on_kernels(directory, [text], block_size=block_size)
    for count in (37, 60, 1, 52):
        texts.step({0: count})
    assert_same_logits(texts.logits_of(0), reference_logits(directory, text))


@pytest.mark.parametrize("dtype", PACK)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(tiny_llama: Callable[[str], Path], dtype: str, num_threads: int) -> None:
    text = random_text(130)
    logits = []
    for threads in (2, num_threads):
        texts = texts_on_kernels(tiny_llama("gqa"), [text], dtype=dtype, num_threads=threads)
        texts.step({0: 100})
        texts.step({0: 30})
        logits.append(texts.logits_of(0))
    assert torch.equal(*logits)


@STORED
@pytest.mark.parametrize("shape", ["gqa", "mqa-tied"])
def test_a_region_of_blocks_gives_the_same_bits(
    tiny_llama: Callable[[str], Path], shape: str, dtype: str, int8: bool
) -> None:
    tokens = [random_text(130), random_text(20, seed=1)]
    whole, region = (
        texts_on_kernels(tiny_llama(shape), tokens, dtype=dtype, int8=int8, region=region) for region in (False, True)
    )
    for texts in (whole, region):
        texts.step({0: 100})
        texts.step({1: 20, 0: 29})
        texts.step({0: 1})
    for text in range(2):
        assert torch.equal(region.logits_of(text), whole.logits_of(text))
    # [text, block]: equal in NaN, too, where nothing was written.
    stored, expected = (_stored(texts.cache)[texts.tables] for texts in (region, whole))
    assert torch.equal(stored, expected)
    num_bytes = sum(np.count_nonzero(region.cache.view(block)) for block in range(region.cache.num_blocks))
    assert num_bytes == torch.count_nonzero(_stored(region.cache)), "wrote outside of it"


LENGTHS = (150, 97, 33, 16, 1)


@STORED
def test_a_row_has_the_same_bits_however_steps_are_cut_and_mixed(
    tiny_llama: Callable[[str], Path], dtype: str, int8: bool
) -> None:
    directory = tiny_llama("gqa")
    tokens = [random_text(length, seed) for seed, length in enumerate(LENGTHS)]
    alone = []
    for text in tokens:
        whole = texts_on_kernels(directory, [text], dtype=dtype, int8=int8)
        whole.step({0: len(text)})
        alone.append(whole.logits_of(0))

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.dictionaries(st.integers(0, len(LENGTHS) - 1), st.integers(1, 100), min_size=1), max_size=12))
    def check(steps: list[dict[int, int]]) -> None:
        together = texts_on_kernels(directory, tokens, dtype=dtype, int8=int8)

        def step(wanted: dict[int, int]) -> None:
            counts = {text: min(n, LENGTHS[text] - together.num_computed[text]) for text, n in wanted.items()}
            if some := {text: count for text, count in counts.items() if count}:
                together.step(some)

        for wanted in steps:
            step(wanted)
        step(dict(enumerate(LENGTHS)))
        for text, expected in enumerate(alone):
            assert torch.equal(together.logits_of(text), expected)

    check()


@pytest.mark.parametrize("dtype", PACK)
def test_states_that_nobody_wants_are_left_out_and_the_others_are_the_same(
    tiny_llama: Callable[[str], Path], dtype: str
) -> None:
    tokens = [random_text(length, seed) for seed, length in enumerate(LENGTHS)]
    whole, part = (texts_on_kernels(tiny_llama("gqa"), tokens, dtype=dtype) for _ in range(2))
    counts = dict(enumerate(LENGTHS))
    wanted = {0: 1, 1: 40, 2: 0, 3: 16, 4: 1}
    whole.step(counts)
    part.step(counts, wanted)
    for text, count in wanted.items():
        expected = whole.logits_of(text)
        assert torch.equal(part.logits_of(text), expected[len(expected) - count :])
    # What is computed later reads the keys and values of all tokens.
    for layer in range(whole.loaded.config.num_layers):
        for of_whole, of_part in zip(
            *(texts.cache.gather(layer, texts.tables) for texts in (whole, part)), strict=True
        ):
            for text, length in counts.items():
                assert torch.equal(of_part[text, :, :length], of_whole[text, :, :length])


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("shape", ["gqa", "mha"])
def test_int8_holds_what_torch_makes_of_the_same_keys_and_values(
    tiny_llama: Callable[[str], Path], shape: str, target: Target
) -> None:
    text = random_text(50)
    wide, narrow = (texts_on_kernels(tiny_llama(shape), [text], int8=int8, target=target) for int8 in (False, True))
    for texts in (wide, narrow):
        texts.step({0: 33})
        texts.step({0: 17})
    # The first layer's follow from the tokens alone.
    exact, stored = ([kv[0, :, :50] for kv in texts.cache.gather(0, texts.tables)] for texts in (wide, narrow))
    for values, gathered in zip(exact, stored, strict=True):
        assert torch.equal(gathered, dequantize(*quantize(values), torch.float32))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", PACK)
def test_int8_on_kernels_is_as_near_as_in_torch(tiny_llama: Callable[[str], Path], dtype: str, target: Target) -> None:
    directory = tiny_llama("biases")
    text = random_text(150)
    expected = reference_logits(directory, text)
    ours = texts_on_kernels(directory, [text], dtype=dtype, int8=True, target=target)
    plain = Texts(load(directory, dtype), [text], int8=True)
    for texts in (ours, plain):
        texts.step({0: 100})
        texts.step({0: 1})
        texts.step({0: 49})
    assert _error(ours.logits_of(0), expected) < 1.05 * _error(plain.logits_of(0), expected) < 0.1


def test_a_key_that_is_not_finite_shows_in_int8_too(tiny_llama: Callable[[str], Path]) -> None:
    texts = texts_on_kernels(tiny_llama("gqa"), [random_text(40)], int8=True)
    texts.step({0: 39})
    assert texts.cache.scales is not None
    assert texts.logits[0][0].isfinite().all()
    texts.cache.scales[texts.tables[0, 1], 0, 0, 1, 3] = torch.nan
    texts.step({0: 1})
    assert texts.logits[0][1].isnan().all()


def _stored(cache: KVCache) -> torch.Tensor:
    """The bytes of values, and those of scales, [blocks, bytes]."""
    parts = [cache.data, *([] if cache.scales is None else [cache.scales])]
    return torch.cat([part.flatten(1).contiguous().view(torch.uint8) for part in parts], 1)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
