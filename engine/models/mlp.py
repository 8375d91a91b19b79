"""The MLP, gated or plain, and its activations."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F

from engine.decoder_config import Activation, MlpConfig
from engine.models.parallel_layers import ColumnParallelLinear, RowParallelLinear

ACTIVATIONS: Final[Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """Some columns of an MLP.

    Args:
        columns: Which of the whole one's.
        tp_rank: Of the ranks that share it; the first adds the bias of their sum.
    """

    def __init__(self, config: MlpConfig, hidden_size: int, columns: range, tp_rank: int) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[config.activation]
        self.gate_proj = ColumnParallelLinear(hidden_size, columns, bias=config.bias) if config.gated else None
        self.up_proj = ColumnParallelLinear(hidden_size, columns, bias=config.bias)
        self.down_proj = RowParallelLinear(columns, hidden_size, bias=config.bias and tp_rank == 0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden)
        activated = self.activate(up) if self.gate_proj is None else self.activate(self.gate_proj(hidden)) * up
        output: torch.Tensor = self.down_proj(activated)
        return output
