"""A batch cut into micro-batches: while one stage of a pipeline computes one, the next computes the one before."""

from collections.abc import Iterator

import numpy as np

from engine.batch import Batch


def micro_batches(batch: Batch, most: int, min_tokens: int) -> Iterator[tuple[slice, Batch]]:
    """Consecutive rows of a batch, and the batch that they are: at most `most` parts, of even size.

    A sequence that is cut goes on in the next part, as it would in the next step. Parts have at least `min_tokens`
    tokens, unless the batch has fewer.
    """
    num_tokens = int(batch.query_lens.sum())
    num_parts = max(1, min(most, num_tokens // min_tokens))
    if num_parts == 1:
        yield slice(0, num_tokens), batch
        return
    ends = batch.query_lens.cumsum()
    begins = ends - batch.query_lens
    for part in range(num_parts):
        first, end = num_tokens * part // num_parts, num_tokens * (part + 1) // num_parts
        members = np.flatnonzero((begins < end) & (ends > first))
        # Of each member's tokens, how many come after this part.
        later = np.maximum(ends[members] - end, 0)
        query_lens = np.minimum(ends[members], end) - np.maximum(begins[members], first)
        rows = slice(first, end)
        yield (
            rows,
            Batch(
                input_ids=batch.input_ids[rows],
                positions=batch.positions[rows],
                slot_mapping=batch.slot_mapping[rows],
                query_lens=query_lens,
                seq_lens=batch.seq_lens[members] - later,
                block_tables=batch.block_tables[int(members[0]) : int(members[-1]) + 1],
                # The tokens whose states are wanted are the last ones of each sequence.
                output_lens=np.clip(batch.output_lens[members] - later, 0, query_lens),
            ),
        )
