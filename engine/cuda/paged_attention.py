"""Paged attention on the device: the kernels of `engine.cuda.kernels`, as an `Attention`.

paged = PagedAttention(kv_cache, …)         once: tile sizes, a view of each layer
attention = TritonAttention(paged, step)    per step
attention.attend(layer, q, k, v, scores)    per layer: store, then one to three launches
"""

import math
from dataclasses import dataclass

import torch

from engine.attention import Scores
from engine.cuda import kernels
from engine.kv_cache import PLAIN, KVCache

# A token's keys are read in at most so many spans, each by one program, and a span is at least so many tiles of keys.
_MAX_SPANS = 32
_MIN_SPAN_KEYS = 128
# The smallest tile that the device multiplies as one.
_MIN_TILE = 16


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What the kernels read of a step, on the device; int64 throughout.

    Attributes:
        positions: [T]. A token at a position below 0 sees nothing, and its output is left as it is.
        slot_mapping: [T]. A slot below 0 is nowhere.
        block_tables: [B, max blocks], of any strides.
        tokens: [2, N], as in `AttentionWork`.
        tiles: [3, M], as in `AttentionWork`.
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    tokens: torch.Tensor
    tiles: torch.Tensor


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the spans of tokens attended alone wait to be merged; see `kernels.attend_spans`."""

    mixed: torch.Tensor
    softmax: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sizes that the kernels are compiled for. They depend on the model alone: they decide the order of sums.

    Attributes:
        chunk_rows: Query rows of a tile of a chunk.
        token_rows: Query rows of a token attended alone: its heads of one KV head, padded.
        tile_keys: Keys taken at once.
        chunk_warps: Warps of a program that attends a tile.
    """

    chunk_rows: int
    token_rows: int
    tile_keys: int
    chunk_warps: int


class PagedAttention:
    """Launches the kernels on one cache.

    Args:
        num_heads: The model's query heads.
        max_keys: Tokens that a sequence has at most.
    """

    def __init__(self, kv_cache: KVCache, *, num_heads: int, max_keys: int) -> None:
        assert kv_cache.layout == PLAIN
        self.kv_cache = kv_cache
        self.num_heads = num_heads
        self._group = num_heads // kv_cache.num_kv_heads
        self._padded_dim = max(_MIN_TILE, power_of_two(kv_cache.head_dim))
        self._shape = _shape(self._group, self._padded_dim, kv_cache.dtype.itemsize)
        self._num_stages = _num_stages(kv_cache.device)
        self._span_tiles = _MIN_SPAN_KEYS // self._shape.tile_keys
        self._num_spans = min(_MAX_SPANS, -(-max_keys // _MIN_SPAN_KEYS))
        self._scale = math.log2(math.e) / math.sqrt(kv_cache.head_dim)
        # [num_blocks, num_kv_heads, 2, block_size, head_dim] each.
        self._layers = kv_cache.data.unbind(2)
        self._strides = kv_cache.data.stride()[:2]

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile of a chunk."""
        return self._shape.chunk_rows // self._group

    def new_parts(self, num_tokens: int) -> Parts:
        """Room for the parts of `num_tokens` tokens attended alone."""
        cache = self.kv_cache
        mixed = (num_tokens, self.num_heads, _MAX_SPANS, cache.head_dim)
        return Parts(
            mixed=torch.empty(mixed, dtype=torch.float32, device=cache.device),
            softmax=torch.empty(2, *mixed[:-1], dtype=torch.float32, device=cache.device),
        )

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Stores keys and values [T, num_kv_heads, head_dim] of one layer, in slots [T]."""
        cache = self.kv_cache
        kernels.store_kv[(len(slot_mapping),)](
            self._layers[layer],
            k,
            v,
            slot_mapping,
            *self._strides,
            _row_stride(k),
            _row_stride(v),
            KV_HEADS=cache.num_kv_heads,
            BLOCK_SIZE=cache.block_size,
            HEAD_DIM=cache.head_dim,
            PADDED=power_of_two(cache.num_kv_heads * cache.head_dim),
            enable_fp_fusion=True,
        )

    def attend_chunks(self, layer: int, q: torch.Tensor, step: DeviceStep, out: torch.Tensor) -> None:
        """Fills the rows of `out`, as `q` [T, num_heads, head_dim], of the tokens in `step.tiles`."""
        cache = self.kv_cache
        num_tiles = step.tiles.shape[1]
        kernels.attend_chunks[(cache.num_kv_heads, num_tiles)](
            out,
            q,
            self._layers[layer],
            step.positions,
            step.tiles,
            step.block_tables,
            num_tiles,
            *step.block_tables.stride(),
            _row_stride(q),
            *self._strides,
            self._scale,
            GROUP=self._group,
            KV_HEADS=cache.num_kv_heads,
            BLOCK_SIZE=cache.block_size,
            HEAD_DIM=cache.head_dim,
            PADDED_DIM=self._padded_dim,
            TILE_ROWS=self._shape.chunk_rows,
            TILE_KEYS=self._shape.tile_keys,
            num_warps=self._shape.chunk_warps,
            num_stages=self._num_stages,
            enable_fp_fusion=True,
        )

    def attend_alone(self, layer: int, q: torch.Tensor, step: DeviceStep, parts: Parts, out: torch.Tensor) -> None:
        """Fills the rows of `out`, as `q` [T, num_heads, head_dim], of the tokens in `step.tokens`."""
        cache = self.kv_cache
        num_tokens = step.tokens.shape[1]
        kernels.attend_spans[(num_tokens, cache.num_kv_heads, self._num_spans)](
            out,
            parts.mixed,
            parts.softmax,
            q,
            self._layers[layer],
            step.positions,
            step.tokens,
            step.block_tables,
            num_tokens,
            *step.block_tables.stride(),
            _row_stride(q),
            *self._strides,
            self._scale,
            GROUP=self._group,
            KV_HEADS=cache.num_kv_heads,
            BLOCK_SIZE=cache.block_size,
            HEAD_DIM=cache.head_dim,
            PADDED_DIM=self._padded_dim,
            TILE_ROWS=self._shape.token_rows,
            TILE_KEYS=self._shape.tile_keys,
            SPAN_TILES=self._span_tiles,
            MAX_SPANS=_MAX_SPANS,
            num_stages=self._num_stages,
            enable_fp_fusion=True,
        )
        if self._num_spans > 1:
            kernels.merge_spans[(num_tokens, self.num_heads)](
                out,
                parts.mixed,
                parts.softmax,
                step.positions,
                step.tokens,
                num_tokens,
                HEADS=self.num_heads,
                HEAD_DIM=cache.head_dim,
                PADDED_DIM=self._padded_dim,
                TILE_KEYS=self._shape.tile_keys,
                SPAN_TILES=self._span_tiles,
                MAX_SPANS=_MAX_SPANS,
                enable_fp_fusion=True,
            )


class TritonAttention:
    """The attention of one step, or of every replay of a recorded one."""

    def __init__(self, paged: PagedAttention, step: DeviceStep) -> None:
        self.kv_cache = paged.kv_cache
        self._paged = paged
        self._step = step
        # The layers share them.
        self._parts = paged.new_parts(step.tokens.shape[1])

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        assert scores == Scores(q.shape[2] ** -0.5), "engine.cuda.support refuses models that score otherwise"
        paged, step = self._paged, self._step
        paged.store(layer, k, v, step.slot_mapping)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if step.tiles.shape[1]:
            paged.attend_chunks(layer, q, step, out)
        if step.tokens.shape[1]:
            paged.attend_alone(layer, q, step, self._parts, out)
        return out


def power_of_two(number: int) -> int:
    """The smallest that is not less than `number`."""
    return 1 << (number - 1).bit_length()


def _shape(group: int, padded_dim: int, itemsize: int) -> _Shape:
    token_rows = max(_MIN_TILE, power_of_two(group))
    if itemsize == 4:
        # Multiplied without tensor cores, out of registers, to float32's precision.
        tile_keys = 32 if padded_dim <= 64 else 16
        return _Shape(chunk_rows=32, token_rows=token_rows, tile_keys=tile_keys, chunk_warps=8)
    if padded_dim <= 128:
        return _Shape(chunk_rows=128, token_rows=token_rows, tile_keys=64, chunk_warps=8)
    return _Shape(chunk_rows=64, token_rows=token_rows, tile_keys=32, chunk_warps=8)


def _num_stages(device: torch.device) -> int:
    """Tiles of keys on their way at once: as many as the shared memory holds beside a tile of queries.

    A stage takes at most 32 KiB, and so do the queries.
    """
    if device.type != "cuda":
        return 1
    return 3 if kernels.max_shared_bytes(device.index or 0) >= 5 * 2**15 else 2


def _row_stride(rows: torch.Tensor) -> int:
    """From one token's heads to the next one's, of [T, heads, head_dim]; a token's heads lie side by side."""
    assert rows.stride(2) == 1
    assert rows.stride(1) == rows.shape[2]
    return rows.stride(0)
