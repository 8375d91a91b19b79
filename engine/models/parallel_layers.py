"""Linear maps and embeddings of which a rank holds a part; of a rank that is alone, all.

`parts` says of each parameter which rows and columns of the whole model's tensor it is.
"""

from typing import Protocol, TypeGuard

import torch
from torch import nn

from engine.weights.checkpoint import Part
from engine.weights.quantized import VOCABULARY_FORMAT, QuantizedWeight, Weight, WeightFormat, embedding, linear


class Reduce(Protocol):
    """Sums partial results over the ranks that share a layer, in place."""

    def __call__(self, partial: torch.Tensor) -> torch.Tensor: ...


def alone(partial: torch.Tensor) -> torch.Tensor:
    """The `Reduce` of a rank that shares its layers with nobody."""
    return partial


class Linear(nn.Linear):
    """A linear map whose weight may be quantised: `weight` is None then."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.quantized: QuantizedWeight | None = None

    def reset_parameters(self) -> None:
        """Nothing: values come from a checkpoint, and a mixture has thousands of maps."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, weight_of(self), self.bias)


class ColumnParallelLinear(Linear):
    """Computes `outputs`, some of the whole map's."""

    def __init__(self, in_features: int, outputs: range, *, bias: bool) -> None:
        super().__init__(in_features, len(outputs), bias=bias)
        self.parts = {"weight": Part(rows=outputs), "bias": Part(rows=outputs)}


class VocabParallelLinear(ColumnParallelLinear):
    """The output matrix: of the logits those of some tokens."""


class RowParallelLinear(Linear):
    """Takes `inputs`, some of the whole map's, and gives a partial result: the whole one is the sum over the ranks.

    The bias belongs to one rank's alone.
    """

    def __init__(self, inputs: range, out_features: int, *, bias: bool) -> None:
        super().__init__(len(inputs), out_features, bias=bias)
        self.parts = {"weight": Part(columns=inputs)}


class VocabParallelEmbedding(nn.Module):
    """Embeds the tokens of `vocab`, and all others as zeros: the whole result is the sum over the ranks."""

    def __init__(self, vocab: range, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        # Not nn.Embedding: for initial values, which nobody reads, that imports torch's compiler, and takes a second.
        self.weight = nn.Parameter(torch.empty(len(vocab), hidden_size))
        self.quantized: QuantizedWeight | None = None
        self.vocab = vocab
        self.parts = {"weight": Part(rows=vocab)}
        self._whole = len(vocab) == vocab_size

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._whole:
            return embedding(token_ids, weight_of(self))
        rows = token_ids - self.vocab.start
        absent = (rows < 0) | (rows >= len(self.vocab))
        return embedding(rows.masked_fill(absent, 0), weight_of(self)).masked_fill_(absent.unsqueeze(-1), 0.0)


def is_quantizable(module: nn.Module) -> TypeGuard[Linear | VocabParallelEmbedding]:
    """Whether a module's matrix may be a `QuantizedWeight`, its `quantized`."""
    return isinstance(module, Linear | VocabParallelEmbedding)


def format_of(module: nn.Module, weight_format: WeightFormat | None) -> WeightFormat | None:
    """How a module's matrix is quantised in a model whose matrices are in `weight_format`; None: not at all."""
    if weight_format is None or not is_quantizable(module):
        return None
    return VOCABULARY_FORMAT if isinstance(module, VocabParallelEmbedding | VocabParallelLinear) else weight_format


def weight_of(module: nn.Module) -> Weight:
    """A module's matrix, quantised or not."""
    if is_quantizable(module) and module.quantized is not None:
        return module.quantized
    return module.get_parameter("weight")


def times(values: range, size: int) -> range:
    """The range of elements, `size` to each of `values`."""
    return range(values.start * size, values.stop * size)
