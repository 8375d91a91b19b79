"""How a step's tokens pass through the model: the seam between the runner and the ways to compute.

TorchExecutor     plain torch, on any device: what every other way is compared with
"""

from typing import Protocol

import torch

from engine.attention import AttentionPlan
from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.models.causal_lm import CausalLM


class ModelExecutor(Protocol):
    """A model with its KV cache. Not thread-safe; what it returns is valid until its next call."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Writes the K and V of the batch's T tokens and returns the R wanted hidden states [R, hidden]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab] float32, of R rows [R, hidden] of what `forward` returned. The caller may overwrite them."""
        ...


def wanted_states(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Of the hidden states [T, hidden] of all tokens, those that the batch asks for."""
    rows = batch.output_rows()
    return hidden if rows is None else hidden[torch.from_numpy(rows).to(hidden.device)]


class TorchExecutor:
    """Runs the model's modules one by one."""

    def __init__(self, model: CausalLM, kv_cache: KVCache) -> None:
        self._model = model
        self._kv_cache = kv_cache

    def forward(self, batch: Batch) -> torch.Tensor:
        hidden = self._model.forward(batch, AttentionPlan(batch, self._kv_cache))
        return wanted_states(hidden, batch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)
