"""A model in few bits: the kernels and plain torch compute with the same weights, a row the same in any company."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.cpu.build import X86_TARGETS, BuildError, Target, kernels_path, this_target
from engine.cpu.executor import CpuExecutor
from engine.cpu.library import Kernels, QuantizeKernels
from engine.executor import ModelExecutor
from engine.kv_cache import KVCache, KVLayout
from engine.loader import LoadedModel, Split, load_model
from engine.models.parallel_layers import Linear, VocabParallelEmbedding, weight_of
from engine.weights.quantized import FORMATS, Quantization, QuantizedWeight
from pdmesh.errors import ConfigError
from tests.texts import Texts, assert_same_logits, load, packed_for, random_text
from tests.tiny_families import make_tiny_family

try:
    TARGETS = X86_TARGETS[X86_TARGETS.index(this_target()) :]
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)
PACK = {"float32": 1, "bfloat16": 2}
# Groups are of 32 columns, and the last one of a map from 90 has 26.
SHAPES = ["gqa", "mqa-tied", "biases", "ragged"]


def quantization(name: str) -> Quantization:
    return Quantization(FORMATS[name], QuantizeKernels(kernels_path(this_target())))


def quantized(directory: Path, dtype: str, name: str) -> LoadedModel:
    """For plain torch."""
    return load(directory, dtype, quantization=quantization(name))


def dequantized(directory: Path, dtype: str, name: str) -> LoadedModel:
    """The same model, its weights dequantised to float32 or bfloat16."""
    loaded = quantized(directory, dtype, name)
    for module in loaded.model.modules():
        if isinstance(module, Linear | VocabParallelEmbedding):
            assert module.quantized is not None
            dequantized = nn.Parameter(module.quantized.dequantized(), requires_grad=False)
            module.register_parameter("weight", dequantized)
            module.quantized = None
    return loaded


def on_kernels(
    directory: Path,
    texts: Sequence[Sequence[int]],
    dtype: str,
    name: str,
    *,
    target: Target | None = None,
    num_threads: int = 2,
) -> Texts:
    def make_executor(loaded: LoadedModel, kv_cache: KVCache) -> ModelExecutor:
        kernels = Kernels(kernels_path(target or this_target()), kv_cache.dtype)
        packed = packed_for(loaded, kernels, num_threads, quantization(name))
        return CpuExecutor(kernels, loaded, packed, kv_cache, max_tokens=512, max_position=256, num_threads=num_threads)

    loaded = load(directory, dtype, stored=True, quantization=quantization(name))
    return Texts(loaded, texts, block_size=16, layout=KVLayout(PACK[dtype]), make_executor=make_executor)


def step_all(texts: Texts, counts: Sequence[int]) -> torch.Tensor:
    for count in counts:
        texts.step({0: count})
    return texts.logits_of(0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_multiply_by_the_dequantised_weights(tiny_llama: Callable[[str], Path], shape: str, name: str) -> None:
    directory, text = tiny_llama(shape), random_text(13 + 25 + 60 + 1)
    counts = (13, 25, 60, 1)
    expected = step_all(Texts(dequantized(directory, "float32", name), [text]), counts)
    assert_same_logits(step_all(on_kernels(directory, [text], "float32", name), counts), expected)
    assert torch.equal(step_all(Texts(quantized(directory, "float32", name), [text]), counts), expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", ["mixtral", "gpt2", "bloom"])
def test_experts_and_matrices_that_are_stored_otherwise(tmp_path: Path, shape: str, name: str) -> None:
    directory, text, counts = make_tiny_family(tmp_path, shape), random_text(60), (13, 46, 1)
    expected = step_all(Texts(dequantized(directory, "float32", name), [text]), counts)
    assert_same_logits(step_all(on_kernels(directory, [text], "float32", name), counts), expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", PACK)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_processor_computes_the_same_model(
    tiny_llama: Callable[[str], Path], target: Target, dtype: str, name: str
) -> None:
    directory, text, counts = tiny_llama("biases"), random_text(39), (13, 25, 1)
    exact = step_all(Texts(dequantized(directory, "float32", name), [text]), counts)
    actual = step_all(on_kernels(directory, [text], dtype, name, target=target), counts)
    if dtype == "float32":
        assert_same_logits(actual, exact)
    else:
        # No further off than torch with weights rounded to bfloat16.
        rounded = step_all(Texts(quantized(directory, dtype, name), [text]), counts)
        assert _error(actual, exact) < 1.2 * _error(rounded, exact)


@pytest.mark.parametrize("name", FORMATS)
def test_plain_torch_computes_in_float16_too(tiny_llama: Callable[[str], Path], name: str) -> None:
    directory, text, counts = tiny_llama("gqa"), random_text(39), (13, 25, 1)
    exact = step_all(Texts(dequantized(directory, "float32", name), [text]), counts)
    actual = step_all(Texts(quantized(directory, "float16", name), [text]), counts)
    # Three bits more than bfloat16 has.
    assert _error(actual, exact) < _error(
        step_all(Texts(quantized(directory, "bfloat16", name), [text]), counts), exact
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", PACK)
def test_a_row_has_the_same_bits_in_any_company(tiny_llama: Callable[[str], Path], dtype: str, name: str) -> None:
    directory = tiny_llama("gqa")
    tokens = [random_text(length, seed) for seed, length in enumerate((150, 97, 33, 16, 1))]
    together = on_kernels(directory, tokens, dtype, name)
    for step in ({0: 1, 1: 1}, {0: 12, 1: 2, 2: 3}, {3: 16, 0: 100}, {4: 1, 0: 5, 1: 94, 2: 30}, {0: 32}):
        together.step(step)
    for text, of_text in enumerate(tokens):
        alone = on_kernels(directory, [of_text], dtype, name, num_threads=1)
        assert torch.equal(together.logits_of(text), step_all(alone, [len(of_text)]))


def rank(directory: Path, tp: int, number: int) -> LoadedModel:
    split = Split(tp=tp, rank=number)
    return load_model(
        str(directory),
        "float32",
        torch.device("cpu"),
        lambda done, total: None,
        split,
        quantization=quantization("int4"),
    )


def test_ranks_have_parts_of_the_weights_that_one_alone_has(tiny_llama: Callable[[str], Path]) -> None:
    directory = tiny_llama("even")
    whole = quantized(directory, "float32", "int4").model
    parts = [rank(directory, 2, number).model for number in range(2)]
    for name, dim in (("self_attn.q_proj", 0), ("self_attn.o_proj", 1), ("mlp.up_proj", 0), ("mlp.down_proj", 1)):
        matrices = []
        for model in (whole, *parts):
            weight = weight_of(model.get_submodule(f"model.layers.1.{name}"))
            assert isinstance(weight, QuantizedWeight)
            matrices.append(weight.dequantized())
        assert torch.equal(torch.cat(matrices[1:], dim=dim), matrices[0]), name


def test_a_rank_that_would_cut_through_a_group_is_refused(tiny_llama: Callable[[str], Path]) -> None:
    # 96 columns of an MLP, shared by two.
    with pytest.raises(ConfigError, match=r"columns 48 to 96 of model.layers.0.mlp.down_proj.*choose another --tp"):
        rank(tiny_llama("gqa"), 2, 1)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
