"""One rank's part of a step: the same calls on every rank, in the same order."""

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Batch
from engine.executor import ModelExecutor, rows_of
from engine.parallel.batches import micro_batches
from engine.parallel.exchange import Exchange

# With fewer, the weights that each micro-batch reads anew cost more than the pipeline saves.
MIN_MICRO_BATCH_TOKENS = 64


class Rank:
    """A shard of the model in a group. Not thread-safe.

    Args:
        executor: Computes the shard.
        last_stage: Of the pipeline: it is this rank's hidden states that are wanted.
        max_micro_batches: Into which a step may be cut; 1 where there is no pipeline.
    """

    def __init__(
        self, executor: ModelExecutor, exchange: Exchange, *, last_stage: bool, max_micro_batches: int
    ) -> None:
        self._executor = executor
        self._exchange = exchange
        self._last_stage = last_stage
        self._max_micro_batches = max_micro_batches
        # Of the step: [R, hidden], at the last stage.
        self._wanted: torch.Tensor | None = None

    def run(self, batch: Batch) -> None:
        """Computes the batch's tokens; at the leader, returns when all ranks have. Raises GroupDownError."""
        self._exchange.begin_step()
        parts = list(micro_batches(batch, self._max_micro_batches, MIN_MICRO_BATCH_TOKENS))
        wanted = []
        for rows, micro_batch in parts:
            hidden = self._executor.forward(micro_batch, self._exchange.receive_hidden(rows))
            if self._last_stage:
                # The executor uses its memory again.
                wanted.append(hidden if len(parts) == 1 else hidden.clone())
            else:
                self._exchange.send_hidden(rows, hidden)
        self._wanted = torch.cat(wanted) if len(wanted) > 1 else wanted[0] if wanted else None
        self._exchange.end_step()

    def logits(self, rows: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """[len(rows), vocab] of some of the wanted states, at the leader. Raises GroupDownError."""
        logits = None
        if self._wanted is not None:
            hidden = rows_of(self._wanted, rows)
            logits = self._executor.logits(hidden, self._exchange.logits_place(len(rows)))
        return self._exchange.gather_logits(len(rows), logits)
