"""Linear maps and embeddings of which a rank holds a part; of a rank that is alone, all.

`parts` says of each parameter which rows and columns of the whole model's tensor it is.
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from engine.weights.checkpoint import Part


class Reduce(Protocol):
    """Sums partial results over the ranks that share a layer, in place."""

    def __call__(self, partial: torch.Tensor) -> torch.Tensor: ...


def alone(partial: torch.Tensor) -> torch.Tensor:
    """The `Reduce` of a rank that shares its layers with nobody."""
    return partial


class ColumnParallelLinear(nn.Linear):
    """Computes `outputs`, some of the whole map's."""

    def __init__(self, in_features: int, outputs: range, *, bias: bool) -> None:
        super().__init__(in_features, len(outputs), bias=bias)
        self.parts = {"weight": Part(rows=outputs), "bias": Part(rows=outputs)}

    def reset_parameters(self) -> None:
        """Nothing: values come from a checkpoint, and a mixture has thousands of maps."""


class RowParallelLinear(nn.Linear):
    """Takes `inputs`, some of the whole map's, and gives a partial result: the whole one is the sum over the ranks.

    The bias belongs to one rank's alone.
    """

    def __init__(self, inputs: range, out_features: int, *, bias: bool) -> None:
        super().__init__(len(inputs), out_features, bias=bias)
        self.parts = {"weight": Part(columns=inputs)}

    def reset_parameters(self) -> None:
        """Nothing, as of `ColumnParallelLinear`."""


class VocabParallelEmbedding(nn.Module):
    """Embeds the tokens of `vocab`, and all others as zeros: the whole result is the sum over the ranks."""

    def __init__(self, vocab: range, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        # Not nn.Embedding: for initial values, which nobody reads, that imports torch's compiler, and takes a second.
        self.weight = nn.Parameter(torch.empty(len(vocab), hidden_size))
        self.vocab = vocab
        self.parts = {"weight": Part(rows=vocab)}
        self._whole = len(vocab) == vocab_size

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._whole:
            return F.embedding(token_ids, self.weight)
        rows = token_ids - self.vocab.start
        absent = (rows < 0) | (rows >= len(self.vocab))
        return F.embedding(rows.masked_fill(absent, 0), self.weight).masked_fill_(absent.unsqueeze(-1), 0.0)


def times(values: range, size: int) -> range:
    """The range of elements, `size` to each of `values`."""
    return range(values.start * size, values.stop * size)
