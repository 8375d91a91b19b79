"""What the runner asks of a model, whatever its architecture."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from engine.attention import Attention
from engine.batch import Batch


class CausalLM(nn.Module, ABC):
    """A decoder-only model over the paged KV cache, or a rank's shard of one.

    Made without memory; `engine.loader` assigns its parameters.
    """

    @abstractmethod
    def forward(self, batch: Batch, attention: Attention, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Runs one step of T tokens, whose K and V `attention` stores.

        Args:
            hidden: [T, hidden] of the stage before; None at the first stage, which embeds the batch's tokens.

        Returns:
            [T, hidden], for the next stage or for `logits`.
        """

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab] float32, of R rows [R, hidden] of what the last stage's `forward` returned."""
