"""Norms of rows: computed in float32, given in the row's dtype."""

import torch
from torch import nn
from torch.nn import functional as F

from engine.decoder_config import NormConfig


class RMSNorm(nn.Module):
    """Scales each row to unit root mean square, then by `weight` in the row's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * _to_unit(hidden.float(), self.eps).to(hidden.dtype)


class OffsetRMSNorm(nn.Module):
    """Scales each row to unit root mean square, then by 1 + `weight` in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return (_to_unit(hidden.float(), self.eps) * (1.0 + self.weight.float())).to(hidden.dtype)


class LayerNorm(nn.Module):
    """Brings each row to mean 0 and unit variance, then times `weight`, plus `bias`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # Torch computes it in float32, whatever the dtype.
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


Norm = RMSNorm | OffsetRMSNorm | LayerNorm


def make_norm(config: NormConfig, size: int) -> Norm:
    """A norm of rows of `size` values."""
    if config.kind == "layer":
        return LayerNorm(size, config.eps)
    return OffsetRMSNorm(size, config.eps) if config.from_one else RMSNorm(size, config.eps)


def _to_unit(wide: torch.Tensor, eps: float) -> torch.Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
