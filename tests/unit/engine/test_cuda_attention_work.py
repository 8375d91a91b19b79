"""Every token of a step is in exactly one list of the attention kernels' work."""

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from engine.cuda.attention_work import MAX_TOKENS_ALONE, AttentionWork, attention_work

Sequences = list[tuple[int, int]]  # query_len, context_len


def work_of(sequences: Sequences, tile_tokens: int) -> AttentionWork:
    query_lens = np.array([query_len for query_len, _ in sequences])
    context_lens = np.array([context_len for _, context_len in sequences])
    return attention_work(query_lens, query_lens + context_lens, tile_tokens)


def tile_ends(sequences: Sequences, tiles: npt.NDArray[np.int64]) -> list[int]:
    """Keys that each tile's last token sees."""
    first_rows = np.cumsum([0] + [query_len for query_len, _ in sequences])
    return [sequences[sequence][1] + first_row - first_rows[sequence] + count for sequence, first_row, count in tiles.T]


@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 300)), min_size=1, max_size=9),
    st.sampled_from([1, 2, 10, 32, 128]),
)
def test_every_token_is_attended_once(sequences: Sequences, tile_tokens: int) -> None:
    work = work_of(sequences, tile_tokens)
    owners = np.repeat(np.arange(len(sequences)), [query_len for query_len, _ in sequences])
    rows = list(work.tokens[0])
    assert (owners[work.tokens[0]] == work.tokens[1]).all()
    for sequence, first_row, count in work.tiles.T:
        assert 1 <= count <= tile_tokens
        tile_rows = range(first_row, first_row + count)
        assert set(owners[tile_rows]) == {sequence}
        rows += tile_rows
    assert sorted(rows) == list(range(len(owners)))


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 300)), min_size=1, max_size=9))
def test_tiles_with_most_keys_come_first(sequences: Sequences) -> None:
    ends = tile_ends(sequences, work_of(sequences, 32).tiles)
    assert ends == sorted(ends, reverse=True)


def test_short_chunks_are_attended_token_by_token() -> None:
    work = work_of([(MAX_TOKENS_ALONE, 1000), (MAX_TOKENS_ALONE + 1, 1000)], 32)
    assert work.tokens.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert work.tiles.tolist() == [[1], [MAX_TOKENS_ALONE], [MAX_TOKENS_ALONE + 1]]


def test_kernels_read_the_lists_row_by_row() -> None:
    work = work_of([(70, 0), (1, 5), (40, 60)], 32)
    assert work.tokens.flags.c_contiguous
    assert work.tiles.flags.c_contiguous
