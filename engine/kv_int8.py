"""Keys and values in 8 bits: symmetric, one scale for each token's head of dimensions, K's and V's each their own.

A token's bytes follow from its own K and V alone, in float32: they are the same whatever batch, chunk or rank computed
it, and whether torch did so or the kernels (engine/cpu/kernels/kv_cache.h), which compute the same.
"""

import torch

# -128 is left out: a value and its negative lie equally far from zero.
_LARGEST = 127.0
# A head of smaller values is zeros: the inverse of its scale might overflow.
_SMALLEST = 1e-30


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [..., head_dim] and float32 scales [...] of `values` [..., head_dim]: these are about the int8 times scale.

    The largest in size becomes 127 or -127, the others round to nearest, ties to even. Where one is not finite, zeros
    and a scale of NaN: what reads them shows it.
    """
    wide = values.float()
    # NaN where one of them is.
    largest = wide.abs().amax(-1)
    scales = torch.where(largest.isfinite(), largest / _LARGEST, torch.nan)
    inverse = torch.where(largest > _SMALLEST, _LARGEST / largest, 0.0)
    return (wide * inverse.unsqueeze(-1)).nan_to_num_(0.0).round_().to(torch.int8), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., head_dim] of `dtype`, of what `quantize` gave; product and rounding in float32."""
    return (values.float() * scales.unsqueeze(-1)).to(dtype)
