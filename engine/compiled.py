"""`torch.compile` of one decoder layer, for all of a model's layers.

The layers are one program over different weights, so it is compiled once: per layer, compiling takes as many times
longer as there are layers. Two variants are made at once, for one token and for any other number of them, and nothing
is compiled later. Attention is not looked into: each layer is compiled up to it and from there on.

In half precision what is fused rounds less often than torch's single operations do: results are as near the exact
ones, but not equal to theirs.
"""

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from engine.attention import Attention, Scores
from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.models.causal_lm import CausalLM
from engine.models.experts import Mixture
from engine.models.positions import Rotation

log = logging.getLogger(__name__)

# Numbers of tokens to compile for: any but one (a prime, lest the compiler take it for a size of the model), and one.
_WARM_UP_TOKENS = (7, 1)


_Run = Callable[[nn.Module, torch.Tensor, Rotation | None, Attention], torch.Tensor]


def compile_layers(model: CausalLM, kv_cache: KVCache) -> float:
    """Compiles the repeated blocks of `model`, in place, for where its parameters are. Returns the seconds it took.

    On CPUs this needs a C++ compiler, on CUDA devices Triton.
    """
    began = time.monotonic()
    for module in model.modules():
        if isinstance(module, Mixture):
            # Which experts there is work for is known when they are chosen. Said here and not of the class: to say it,
            # torch imports its compiler, which takes seconds, and 70 MB in every process.
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign, no-untyped-call]
    run = torch.compile(_run, dynamic=True)
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleDict)]:
        for name, block in blocks.items():
            blocks[name] = _CompiledBlock(block, run)
    # Else each layer's index is a constant of its program, and no other layer can use that.
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for num_tokens in _WARM_UP_TOKENS:
            model.forward(_batch(num_tokens, kv_cache.device), _NoAttention(kv_cache))
    seconds = time.monotonic() - began
    log.info("compiled the model's layers in %.1f s", seconds)
    return seconds


def _run(block: nn.Module, hidden: torch.Tensor, rotation: Rotation | None, attention: Attention) -> torch.Tensor:
    """The one function that is compiled; the block is an argument of it."""
    output: torch.Tensor = block(hidden, rotation, attention)
    return output


class _CompiledBlock(nn.Module):
    """A decoder layer that runs compiled."""

    def __init__(self, block: nn.Module, run: _Run) -> None:
        super().__init__()
        self.block = block
        self._run = run

    def forward(self, hidden: torch.Tensor, rotation: Rotation | None, attention: Attention) -> torch.Tensor:
        return self._run(self.block, hidden, rotation, _Uncompiled(attention))


class _Uncompiled:
    """An `Attention` that the compiler does not look into."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention

    @property
    def kv_cache(self) -> KVCache:
        return self._attention.kv_cache

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        return self._attention.attend(layer, q, k, v, scores)


class _NoAttention:
    """Gives each token its own queries back, and stores nothing: what is compiled needs shapes alone."""

    def __init__(self, kv_cache: KVCache) -> None:
        self.kv_cache = kv_cache

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        # Memory of its own, as what attention gives back is.
        return q.clone()


def _batch(num_tokens: int, device: torch.device) -> Batch:
    rows = torch.arange(num_tokens, device=device)
    lens = np.array([num_tokens])
    return Batch(
        input_ids=torch.zeros_like(rows),
        positions=rows,
        slot_mapping=rows,
        query_lens=lens,
        seq_lens=lens,
        block_tables=torch.zeros(1, 1, dtype=torch.int64, device=device),
        output_lens=lens,
    )
