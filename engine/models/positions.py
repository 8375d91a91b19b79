"""How tokens learn where they are: angles to turn by, vectors of positions, or slopes of scores."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from engine.rope import RopeConfig, angles, inverse_frequencies


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, as `engine.rope.rotate` takes them."""

    cos: torch.Tensor
    sin: torch.Tensor


class RotaryTable(nn.Module):
    """Angles of positions."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.attention_scaling = rope.attention_scaling
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", inverse_frequencies(rope, head_dim), persistent=False)

    def forward(self, positions: torch.Tensor) -> Rotation:
        return Rotation(*angles(positions, self.inv_freq, self.attention_scaling))


class PositionEmbedding(nn.Module):
    """A vector for each position; row `offset` is that of position 0."""

    def __init__(self, num_positions: int, hidden_size: int, offset: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_positions + offset, hidden_size))
        self.offset = offset

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        # What pads a recorded step is nowhere, below 0; nobody reads its row.
        return F.embedding(positions.clamp(min=0) + self.offset, self.weight)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Of each head of a model, as BLOOM has them.

    A geometric series for as many heads as the power of two below; the others take every other value of the series
    for twice as many.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    between = [2.0 ** (-4.0 * (2 * head + 1) / power) for head in range(num_heads - power)]
    return (*slopes, *between)
