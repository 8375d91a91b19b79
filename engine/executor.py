"""How a step's tokens pass through the model: the seam between the runner and the ways to compute.

runner ─▶ StepExecutor    OneProcess, or the leader of a group of ranks (engine/parallel)
              └─▶ ModelExecutor    TorchExecutor: plain torch, on any device, what every other way is compared with;
                                   engine/cpu, engine/cuda
"""

from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.attention import AttentionPlan
from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.models.causal_lm import CausalLM


class ModelExecutor(Protocol):
    """A model, or a rank's shard of one, with its KV cache.

    Not thread-safe; what it returns is valid until its next call.
    """

    def forward(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Writes the K and V of the batch's T tokens.

        Args:
            hidden: [T, hidden] of the stage before, where this is not the first one of a pipeline.

        Returns:
            The R wanted hidden states [R, hidden]; of a stage that is not the last, all [T, hidden].
        """
        ...

    def logits(self, hidden: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
        """[R, vocab] float32, of R rows [R, hidden] of what `forward` returned, in `place` if that is given.

        The caller may overwrite them.
        """
        ...


class StepExecutor(Protocol):
    """All of a model, as the runner has its steps computed: by this process, or by a group of them."""

    def run(self, batch: Batch) -> None:
        """Writes the K and V of the batch's tokens."""
        ...

    def logits(self, index: int) -> torch.Tensor:
        """[len(rows), vocab] float32 of `rows = batch.logit_rows[index]`, in the order of the indices.

        Valid until the next call; the caller may overwrite them.
        """
        ...


class OneProcess:
    """Implements StepExecutor with a whole model."""

    def __init__(self, executor: ModelExecutor) -> None:
        self._executor = executor
        self._rows: tuple[npt.NDArray[np.int64], ...] = ()
        self._wanted = torch.empty(0)

    def run(self, batch: Batch) -> None:
        self._rows = batch.logit_rows
        self._wanted = self._executor.forward(batch)

    def logits(self, index: int) -> torch.Tensor:
        return self._executor.logits(rows_of(self._wanted, self._rows[index]))


def rows_of(hidden: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
    """Those rows, in memory that is read through where all are asked for."""
    return hidden if len(rows) == len(hidden) else hidden[torch.from_numpy(rows).to(hidden.device)]


def wanted_states(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Of the hidden states [T, hidden] of all tokens, those that the batch asks for."""
    rows = batch.output_rows()
    return hidden if rows is None else hidden[torch.from_numpy(rows).to(hidden.device)]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device; itself where they are."""
    if batch.input_ids.device == device:
        return batch
    return replace(
        batch,
        input_ids=batch.input_ids.to(device),
        positions=batch.positions.to(device),
        slot_mapping=batch.slot_mapping.to(device),
        block_tables=batch.block_tables.to(device),
    )


class TorchExecutor:
    """Runs the model's modules one by one."""

    def __init__(self, model: CausalLM, kv_cache: KVCache, *, last_stage: bool = True) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._last_stage = last_stage

    def forward(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        batch = on_device(batch, self._kv_cache.device)
        if hidden is not None:
            hidden = hidden.to(self._kv_cache.dtype)
        output = self._model.forward(batch, AttentionPlan(batch, self._kv_cache), hidden)
        return wanted_states(output, batch) if self._last_stage else output

    def logits(self, hidden: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
        logits = self._model.logits(hidden)
        return logits if place is None else place.copy_(logits)
