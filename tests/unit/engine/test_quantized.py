"""Weights in few bits: what quantising loses, what it keeps, and that kernels and plain torch have the same ones."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize

from engine.cpu.build import BuildError, kernels_path, this_target
from engine.cpu.library import QuantizeKernels
from engine.weights.quantized import FORMATS, QuantizedWeight, embedding, linear, quantize
from pdmesh.errors import ConfigError

try:
    KERNELS = QuantizeKernels(kernels_path(this_target()))
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)
SHAPES = [(1, 1), (3, 31), (5, 32), (7, 100), (33, 64), (600, 576)]


def random_matrix(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """With groups of other sizes, of one sign, of one value, and zeros."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, k, generator=draw) * torch.logspace(-4, 2, n)[:, None]
    matrix[n // 5] = 0.0
    matrix[n // 3].abs_().add_(1.0)
    matrix[n // 2] = -0.37
    return matrix


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_off_by_half_a_step_at_most(name: str, shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape)
    quantized = quantize(matrix, FORMATS[name])
    assert quantized.nbytes == FORMATS[name].num_bytes(*shape)
    assert quantized.shape == shape
    padding = -shape[1] % 32
    groups = torch.nn.functional.pad(matrix[None], (0, padding), mode="replicate").view(shape[0], -1, 32)
    size = groups.abs().amax(-1, keepdim=True)
    steps = size / 127 if name == "int8" else (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    # Scales and minima are rounded to float16, where the smallest numbers are 2^-24 apart.
    allowed = 0.5 * steps + 1.5e-3 * size + 64 * 2.0**-24
    errors = torch.nn.functional.pad(quantized.dequantized() - matrix, (0, padding)).view(groups.shape)
    if name == "int4":
        # A group's largest value may be cut off where that makes the others better.
        errors = errors.square().mean(-1, keepdim=True).sqrt()
    assert (errors.abs() <= allowed).all()


def test_ranges_of_4_bits_are_fitted_to_the_values() -> None:
    matrix = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    groups = matrix.view(64, -1, 32)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    steps = (high - low) / 15
    from_least_to_largest = ((groups - low) / steps).round() * steps + low
    errors = (quantize(matrix, FORMATS["int4"]).dequantized().view(groups.shape) - groups).square()
    assert errors.sum() < 0.88 * (from_least_to_largest - groups).square().sum()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_quantise_to_the_same_bits(name: str, shape: tuple[int, int]) -> None:
    for seed in range(3):
        matrix = random_matrix(*shape, seed)
        plain, ours = quantize(matrix, FORMATS[name]), quantize(matrix, FORMATS[name], KERNELS)
        assert torch.equal(ours.values, plain.values)
        assert torch.equal(ours.scales, plain.scales)
        if plain.minima is not None:
            assert ours.minima is not None
            assert torch.equal(ours.minima, plain.minima)


@pytest.mark.parametrize(("encoding", "name"), [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4")])
def test_what_gguf_quantised_keeps_its_values(encoding: str, name: str) -> None:
    kind = GGMLQuantizationType[encoding]
    values = (np.random.default_rng(0).standard_normal((300, 512)) * 0.03).astype(np.float32)
    stored = torch.from_numpy(gguf_dequantize(gguf_quantize(values, kind), kind).copy())
    assert torch.equal(quantize(stored, FORMATS[name], KERNELS).dequantized(), stored)


@pytest.mark.parametrize("quantizer", [None, KERNELS], ids=["torch", "kernels"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_no_few_bits_can_stand_for_is_refused(name: str, quantizer: QuantizeKernels | None, value: float) -> None:
    matrix = random_matrix(6, 96)
    matrix[3, 40] = value
    with pytest.raises(ConfigError, match="NaN, or values too large"):
        quantize(matrix, FORMATS[name], quantizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_plain_torch_computes_with_the_dequantised_matrix(name: str, dtype: torch.dtype) -> None:
    matrix = random_matrix(40, 70).to(dtype)
    quantized = quantize(matrix, FORMATS[name])
    dequantized = quantized.dequantized()
    assert dequantized.dtype == dtype
    hidden, bias, tokens = torch.randn(3, 70).to(dtype), torch.randn(40).to(dtype), torch.tensor([5, 0, 39, 5])
    assert torch.equal(linear(hidden, quantized, bias), torch.nn.functional.linear(hidden, dequantized, bias))
    assert torch.equal(embedding(tokens, quantized), dequantized[tokens])


def test_rows_quantised_by_and_by_are_those_of_the_whole() -> None:
    matrix = random_matrix(50, 100)
    whole = quantize(matrix, FORMATS["int4"])
    pieces = QuantizedWeight.empty(FORMATS["int4"], 50, 100, torch.float32)
    for first in range(0, 50, 16):
        pieces.store_rows(first, matrix[first : first + 16])
    assert torch.equal(pieces.dequantized(), whole.dequantized())
    some = torch.tensor([3, 49, 0])
    assert torch.equal(pieces[some].dequantized(), whole.dequantized()[some])
