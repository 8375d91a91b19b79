"""A batch cut into micro-batches is the same work: put together again, it is the batch."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Batch
from engine.parallel.batches import micro_batches

BLOCK_SIZE = 4


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Decodes and chunks, of which some states are wanted."""
    sequences = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=12))
    query_lens = np.array([query_len for query_len, _ in sequences])
    seq_lens = np.array([query_len + context_len for query_len, context_len in sequences])
    output_lens = np.array([draw(st.sampled_from([0, 1, query_len])) for query_len in query_lens.tolist()])
    positions = np.concatenate([np.arange(seq - query, seq) for query, seq in zip(query_lens, seq_lens, strict=True)])
    max_blocks = -(-int(seq_lens.max()) // BLOCK_SIZE)
    tables = np.arange(len(sequences) * max_blocks).reshape(-1, max_blocks)
    owners = np.repeat(np.arange(len(sequences)), query_lens)
    return Batch(
        input_ids=torch.arange(len(positions)) + 1000,
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE),
        query_lens=query_lens,
        seq_lens=seq_lens,
        block_tables=torch.from_numpy(tables),
        output_lens=output_lens,
    )


def rows_of(batch: Batch) -> list[tuple[int, int, int, int, tuple[int, ...], bool]]:
    """Of each token: its id, position, slot, how many tokens it attends to, its sequence's blocks, whether its state
    is wanted."""
    owners = np.repeat(np.arange(len(batch.query_lens)), batch.query_lens)
    firsts = batch.query_lens.cumsum() - batch.query_lens
    rows = []
    wanted = batch.output_rows()
    for row, owner in enumerate(owners):
        place = row - int(firsts[owner])
        rows.append(
            (
                int(batch.input_ids[row]),
                int(batch.positions[row]),
                int(batch.slot_mapping[row]),
                int(batch.seq_lens[owner] - batch.query_lens[owner]) + place + 1,
                tuple(batch.block_tables[owner].tolist()),
                wanted is None or row in wanted,
            )
        )
    return rows


@given(batches(), st.integers(1, 9), st.integers(1, 50))
def test_micro_batches_put_together_are_the_batch(batch: Batch, most: int, min_tokens: int) -> None:
    parts = list(micro_batches(batch, most, min_tokens))
    num_tokens = len(batch.input_ids)
    assert [row for rows, _ in parts for row in range(num_tokens)[rows]] == list(range(num_tokens))
    assert [row for _, part in parts for row in rows_of(part)] == rows_of(batch)

    sizes = [rows.stop - rows.start for rows, _ in parts]
    assert [len(part.input_ids) for _, part in parts] == sizes
    assert len(parts) == max(1, min(most, num_tokens // min_tokens))
    assert max(sizes) - min(sizes) <= 1
    for _, part in parts:
        assert part.query_lens.min() > 0
        assert part.query_lens.sum() == len(part.input_ids)
        # What a position tells the rotary embedding is what attention takes it for.
        ends = part.query_lens.cumsum() - 1
        assert np.array_equal(part.positions.numpy()[ends] + 1, part.seq_lens)


def test_a_cut_sequence_goes_on_in_the_next_part() -> None:
    batch = Batch(
        input_ids=torch.arange(10),
        positions=torch.tensor([7, 3, 4, 5, 6, 7, 8, 9, 10, 2]),
        slot_mapping=torch.arange(10) + 100,
        query_lens=np.array([1, 8, 1]),
        seq_lens=np.array([8, 11, 3]),
        block_tables=torch.tensor([[1, 2, 0], [3, 4, 5], [6, 0, 0]]),
        output_lens=np.array([1, 6, 0]),
    )
    (first_rows, first), (second_rows, second) = micro_batches(batch, most=2, min_tokens=5)
    assert (first_rows, second_rows) == (slice(0, 5), slice(5, 10))
    assert (first.query_lens.tolist(), first.seq_lens.tolist(), first.output_lens.tolist()) == ([1, 4], [8, 7], [1, 2])
    assert (second.query_lens.tolist(), second.seq_lens.tolist()) == ([4, 1], [11, 3])
    assert second.output_lens.tolist() == [4, 0]
    assert (first.block_tables.tolist(), second.block_tables.tolist()) == (
        [[1, 2, 0], [3, 4, 5]],
        [[3, 4, 5], [6, 0, 0]],
    )
