"""What the runner asks of a model, whatever its architecture."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from engine.attention import Attention
from engine.batch import Batch


class CausalLM(nn.Module, ABC):
    """A decoder-only model over the paged KV cache. Made without memory; `engine.loader` assigns its parameters."""

    @abstractmethod
    def forward(self, batch: Batch, attention: Attention) -> torch.Tensor:
        """Runs one step of T tokens, whose K and V `attention` stores. Returns their hidden states [T, hidden]."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab] float32, of R rows [R, hidden] of what `forward` returned."""
