"""Parts of a linear map and of an embedding: put together, or added up, they are the whole."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.models.parallel_layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, times
from engine.weights.checkpoint import Part

# Uneven, as heads that do not divide evenly make them.
SPLITS = [[range(12)], [range(5), range(5, 12)], [range(1), range(1, 4), range(4, 12)]]


def filled(module: nn.Module, parts: dict[str, Part], **whole: torch.Tensor) -> nn.Module:
    """The module with its parts of these values."""
    for name, parameter in module.named_parameters():
        values, part = whole[name], parts.get(name, Part())
        if part.rows is not None:
            rows = part.rows_of(tuple(values.shape))
            values = values[rows.start : rows.stop]
        if part.columns is not None:
            values = values[:, part.columns.start : part.columns.stop]
        assert parameter.shape == values.shape
        parameter.data = values
    return module


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("bias", [False, True])
def test_columns_side_by_side(split: list[range], bias: bool) -> None:
    inputs, weight, offsets = torch.randn(3, 7), torch.randn(12, 7), torch.randn(12)
    ranks = [ColumnParallelLinear(7, outputs, bias=bias) for outputs in split]
    outputs = [filled(rank, rank.parts, weight=weight, bias=offsets)(inputs) for rank in ranks]
    torch.testing.assert_close(torch.cat(outputs, dim=1), F.linear(inputs, weight, offsets if bias else None))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("bias", [False, True])
def test_rows_added_up(split: list[range], bias: bool) -> None:
    inputs, weight, offsets = torch.randn(3, 12), torch.randn(7, 12), torch.randn(7)
    ranks = [RowParallelLinear(part, 7, bias=bias and rank == 0) for rank, part in enumerate(split)]
    partials = [
        filled(rank, rank.parts, weight=weight, bias=offsets)(inputs[:, part.start : part.stop])
        for rank, part in zip(ranks, split, strict=True)
    ]
    torch.testing.assert_close(sum(partials), F.linear(inputs, weight, offsets if bias else None))


@pytest.mark.parametrize("split", SPLITS)
def test_embeddings_added_up(split: list[range]) -> None:
    token_ids, weight = torch.tensor([0, 11, 4, 5, 0, 3]), torch.randn(12, 6)
    ranks = [VocabParallelEmbedding(vocab, 12, 6) for vocab in split]
    partials = [filled(rank, rank.parts, weight=weight)(token_ids) for rank in ranks]
    # Of each token one rank gives the values, and all others exact zeros.
    assert torch.equal(torch.stack(partials).sum(0), weight[token_ids])
    assert sum(int(partial.any(dim=1).sum()) for partial in partials) == len(token_ids)


def test_the_elements_of_heads() -> None:
    assert times(range(2, 5), 16) == range(32, 80)
    assert times(range(3, 3), 16) == range(48, 48)
