"""Runs a model on a CUDA device: steps of decodes alone from recorded graphs, others module by module."""

import logging

import torch

from engine.batch import Batch
from engine.cuda.decode_graphs import DecodeGraphs
from engine.cuda.eager_steps import EagerSteps
from engine.cuda.paged_attention import PagedAttention
from engine.kv_cache import KVCache
from engine.models.causal_lm import CausalLM

log = logging.getLogger(__name__)


class CudaExecutor:
    """A `ModelExecutor` that takes batches which lie on the host, and sends each to the device in one copy.

    For models and devices for which `engine.cuda.support.no_kernels_because` has no reason. Making one takes seconds:
    kernels are compiled, once per machine, and graphs recorded.

    Args:
        num_heads: Query heads of the model, or of its shard.
        kv_cache: In the plain layout.
        max_num_seqs: Sequences of a step at most.
        max_blocks: Blocks of a sequence at most.
    """

    def __init__(
        self, model: CausalLM, num_heads: int, kv_cache: KVCache, *, max_num_seqs: int, max_blocks: int
    ) -> None:
        self._model = model
        paged = PagedAttention(kv_cache, num_heads=num_heads, max_keys=max_blocks * kv_cache.block_size)
        self._eager = EagerSteps(model, paged)
        log.info("compiled the attention kernels in %.1f s", self._eager.warm_up())
        self._graphs = DecodeGraphs(model, paged, max_num_seqs=max_num_seqs, max_blocks=max_blocks)

    def forward(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        assert hidden is None, "a stage of a pipeline runs in plain torch"
        if batch.query_lens.max() == 1:
            return self._graphs.replay(batch)
        return self._eager.forward(batch)

    def logits(self, hidden: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
        # Not in the graphs: the host launches this while the device is still at the layers.
        logits = self._model.logits(hidden)
        return logits if place is None else place.copy_(logits)
