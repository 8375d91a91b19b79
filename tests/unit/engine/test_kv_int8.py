"""Keys and values in 8 bits: as near as 8 bits come, whatever their size, and each head's by itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kv_int8 import dequantize, quantize

SIZES = st.floats(1e-25, 1e30)


@given(st.integers(0, 1000), SIZES)
def test_no_value_is_further_off_than_half_a_step(seed: int, size: float) -> None:
    values = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(seed)) * size
    quantized, scales = quantize(values)
    largest = values.abs().amax(-1)
    assert torch.equal(quantized.abs().amax(-1), torch.full((3, 2), 127, dtype=torch.int8))
    torch.testing.assert_close(scales, largest / 127)
    error = (dequantize(quantized, scales, torch.float32) - values).abs().amax(-1)
    assert bool((error <= 0.5001 * scales).all())


@given(st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_heads_bytes_do_not_depend_on_others(seed: int, dtype: torch.dtype) -> None:
    values = torch.randn(7, 3, 48, generator=torch.Generator().manual_seed(seed)).to(dtype)
    together = quantize(values)
    for token in range(7):
        for head in range(3):
            alone = quantize(values[token, head])
            assert all(torch.equal(whole[token, head], part) for whole, part in zip(together, alone, strict=True))


def test_halves_round_to_even_and_signs_are_alike() -> None:
    quantized, scales = quantize(torch.tensor([[127.0, 0.5, 1.5, 2.5, -2.5, -127.0]]))
    assert quantized.tolist() == [[127, 0, 2, 2, -2, -127]]
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("size", [0.0, 1e-31, 1e-44])
def test_what_is_next_to_nothing_is_zero(size: float) -> None:
    quantized, scales = quantize(torch.tensor([size, -size, 0.0]))
    assert quantized.tolist() == [0, 0, 0]
    assert dequantize(quantized, scales, torch.float32).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_whole_head_and_in_no_other(value: float) -> None:
    values = torch.ones(2, 4)
    values[1, 2] = value
    quantized, scales = quantize(values)
    assert dequantize(quantized, scales, torch.float32).isnan().tolist() == [[False] * 4, [True] * 4]
