"""Norms of models as the kernels compute them."""

from engine.cpu.program import RowNorm
from engine.models.norms import LayerNorm, Norm, OffsetRMSNorm


def row_norm(norm: Norm) -> RowNorm:
    """What a program is told of a norm."""
    if isinstance(norm, LayerNorm):
        return RowNorm(norm.weight, norm.eps, norm.bias, centred=True)
    scale = norm.weight.float()
    return RowNorm(1.0 + scale if isinstance(norm, OffsetRMSNorm) else scale, norm.eps)
