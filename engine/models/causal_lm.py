"""What the runner asks of a model, whatever its architecture."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from engine.batch import Batch
from engine.kv_cache import KVCache


class CausalLM(nn.Module, ABC):
    """A decoder-only model over the paged KV cache. Made without memory; `engine.loader` assigns its parameters."""

    @abstractmethod
    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """Runs one step: writes the K and V of its T tokens to `kv_cache`, returns their hidden states [T, hidden]."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab] float32, of R rows [R, hidden] of what `forward` returned."""
