"""Batches for an executor without scheduler and block pool."""

from collections.abc import Sequence

import numpy as np
import torch

from engine.batch import Batch

BLOCK_SIZE = 16


def plain_batch(query_lens: Sequence[int], context_lens: Sequence[int]) -> Batch:
    """Sequences with blocks of their own, one after the other from block 0; what lies in them matters to nobody.

    The last state of each is wanted, for one call for logits.
    """
    queries = np.array(query_lens, np.int64)
    seq_lens = queries + np.array(context_lens, np.int64)
    max_blocks = int(-(-seq_lens.max() // BLOCK_SIZE))
    tables = np.arange(len(queries) * max_blocks).reshape(len(queries), max_blocks)
    positions = np.concatenate([np.arange(end - count, end) for count, end in zip(queries, seq_lens, strict=True)])
    owners = np.repeat(np.arange(len(queries)), queries)
    slots = tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    return Batch(
        input_ids=torch.from_numpy(positions),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        query_lens=queries,
        seq_lens=seq_lens,
        block_tables=torch.from_numpy(tables),
        output_lens=np.ones_like(queries),
        logit_rows=(np.arange(len(queries)),),
    )
