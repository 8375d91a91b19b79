"""The tensors of one step: every scheduled token of every request, laid end to end, nothing padded."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(slots=True)
class Batch:
    """Input of one forward pass over T tokens of B sequences.

    A sequence contributes query_len new tokens after context_len tokens that lie in its blocks already;
    seq_len = context_len + query_len. Sequences lie in the order of `query_lens`.

    Attributes:
        input_ids: [T] int64.
        positions: [T] int64, position of each token in its sequence.
        slot_mapping: [T] int64, where each token's K and V go: block_id * block_size + offset.
        query_lens: [B] int64, tokens of each sequence in this step. On the host: they shape the work.
        seq_lens: [B] int64, tokens of each sequence after this step. On the host.
        block_tables: [B, max blocks] int64, padded with 0.
        output_lens: [B] int64, of how many of each sequence's last tokens in this step the hidden states are wanted.
            On the host. Those R tokens' rows, sequence by sequence, are what a forward pass returns.
        logit_rows: Of each call for logits that follows, in order: which of the R rows, ascending. On the host.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_lens: npt.NDArray[np.int64]
    seq_lens: npt.NDArray[np.int64]
    block_tables: torch.Tensor
    output_lens: npt.NDArray[np.int64]
    logit_rows: tuple[npt.NDArray[np.int64], ...] = ()

    def output_rows(self) -> npt.NDArray[np.int64] | None:
        """[R], ascending: which of the T rows are wanted; None where all are."""
        if np.array_equal(self.output_lens, self.query_lens):
            return None
        ends = self.output_lens.cumsum()
        # Each sequence's rows end where its queries do.
        rows: npt.NDArray[np.int64] = np.arange(ends[-1]) + np.repeat(self.query_lens.cumsum() - ends, self.output_lens)
        return rows
