"""Who attends to what in a step: the attention kernels' work lists, worked out on the host by numpy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Chunks up to this long are attended token by token, as decodes are: each token's keys are then read by many programs
# at once, where a tile of the few rows there are would read a long context alone.
MAX_TOKENS_ALONE = 4


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """A step's tokens, each in one of two lists.

    Attributes:
        tokens: [2, N] int64, tokens attended alone: row in the step, sequence.
        tiles: [3, M] int64, runs of successive tokens attended together: sequence, first row, number of tokens.
    """

    tokens: npt.NDArray[np.int64]
    tiles: npt.NDArray[np.int64]


def attention_work(
    query_lens: npt.NDArray[np.int64], seq_lens: npt.NDArray[np.int64], tile_tokens: int
) -> AttentionWork:
    """The work of B sequences with `query_lens` tokens each in the step, up to `seq_lens`; a tile takes `tile_tokens`.

    Tiles with the most keys come first, so that the device does not end on a long one.
    """
    sequences = np.arange(len(query_lens))
    first_rows = query_lens.cumsum() - query_lens
    is_alone = query_lens <= MAX_TOKENS_ALONE
    of_token = np.repeat(sequences, query_lens)
    rows = np.flatnonzero(is_alone[of_token])
    tokens = np.stack((rows, of_token[rows]))

    num_tiles = np.where(is_alone, 0, -(-query_lens // tile_tokens))
    of_tile = np.repeat(sequences, num_tiles)
    first_tiles = num_tiles.cumsum() - num_tiles
    first_tokens = (np.arange(len(of_tile)) - first_tiles[of_tile]) * tile_tokens
    counts = np.minimum(tile_tokens, query_lens[of_tile] - first_tokens)
    num_keys = (seq_lens - query_lens)[of_tile] + first_tokens + counts
    order = np.argsort(-num_keys, kind="stable")
    tiles = np.stack((of_tile[order], (first_rows[of_tile] + first_tokens)[order], counts[order]))
    return AttentionWork(tokens, tiles)
