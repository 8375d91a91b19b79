"""The device's part of paged attention, in Triton: keys and values stored in their slots, and attended where they lie.

Imported only where Triton is. Runs without a device too, slowly, where TRITON_INTERPRET=1 was set before the import.

One layer of the cache is [num_blocks, num_kv_heads, 2, BLOCK_SIZE, HEAD_DIM] with gaps between its blocks and between
their heads; index 0 of the third is K. The G query heads that share a KV head become G rows of one tile per token, so K
and V are read once for all of them: row r of a tile is head r % G of token r // G.

A softmax is folded over TILE_KEYS keys at a time, in float32 and base 2 (`scale` has log2(e) in it): `peak` is the
largest score so far, `total` the sum of exponentials and `mixed` the sum of values, both relative to `peak`
(https://arxiv.org/abs/2205.14135). Keys are folded in an order that depends on nothing but a row's own position, so
its result does not change with what else is in the step. Slots past a sequence's end may hold NaN and are never loaded.
"""

# Triton has no types, and a kernel's arguments are pointers and numbers of the device.
# mypy: disable-error-code="import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["k_stride", "v_stride"])
def store_kv(
    cache,
    k,
    v,
    slots,
    block_stride,
    head_stride,
    k_stride,
    v_stride,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Program (token): its K and V to its slot; a slot below 0 is nowhere. PADDED: KV_HEADS * HEAD_DIM or more."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        items = tl.arange(0, PADDED)
        inside = items < KV_HEADS * HEAD_DIM
        head = items // HEAD_DIM
        target = cache + (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * HEAD_DIM
        target += head * head_stride + items % HEAD_DIM
        tl.store(target, tl.load(k + token * k_stride + items, mask=inside), mask=inside)
        target += BLOCK_SIZE * HEAD_DIM
        tl.store(target, tl.load(v + token * v_stride + items, mask=inside), mask=inside)


@triton.jit
def _fold(
    peak,
    total,
    mixed,
    q,
    keys,
    row_positions,
    end,
    cache,
    table,
    table_step,
    block_stride,
    scale,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes the keys at positions `keys` into each row's softmax.

    MASKED: some are past `end`, or past some row's own position. `cache` points at the KV head in block 0.
    """
    dims = tl.arange(0, PADDED_DIM)
    if MASKED:
        stored = keys < end
        blocks = tl.load(table + (keys // BLOCK_SIZE) * table_step, mask=stored, other=0)
    else:
        blocks = tl.load(table + (keys // BLOCK_SIZE) * table_step)
    runs = blocks.to(tl.int64) * block_stride + (keys % BLOCK_SIZE) * HEAD_DIM
    k_at = cache + runs[:, None] + dims[None, :]
    v_at = k_at + BLOCK_SIZE * HEAD_DIM
    if MASKED or PADDED_DIM != HEAD_DIM:
        loaded = (dims < HEAD_DIM)[None, :]
        if MASKED:
            loaded = loaded & stored[:, None]
        k = tl.load(k_at, mask=loaded, other=0.0)
        v = tl.load(v_at, mask=loaded, other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(keys[None, :] <= row_positions[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    kept = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores - new_peak[:, None])
    total = total * kept + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * kept[:, None], input_precision="ieee")
    return new_peak, total, mixed


@triton.jit(do_not_specialize=["num_tiles", "table_stride", "table_step", "q_stride"])
def attend_chunks(
    out,
    q,
    cache,
    positions,
    tiles,
    tables,
    num_tiles,
    table_stride,
    table_step,
    q_stride,
    block_stride,
    head_stride,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    """Program (KV head, tile): successive tokens of one sequence against all keys up to them.

    `tiles` is [3, num_tiles]: sequence, first token's row, number of tokens (at most TILE_ROWS // GROUP).
    """
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = tl.load(tiles + tile)
    first_row = tl.load(tiles + num_tiles + tile)
    num_tokens = tl.load(tiles + 2 * num_tiles + tile).to(tl.int32)
    first_position = tl.load(positions + first_row).to(tl.int32)

    rows = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, PADDED_DIM)
    used = rows < num_tokens * GROUP
    # Rows that nobody reads attend as the last token does: no softmax is empty.
    row_positions = first_position + tl.minimum(rows // GROUP, num_tokens - 1)
    head = kv_head * GROUP + rows % GROUP
    within = head[:, None] * HEAD_DIM + dims[None, :]
    row_at = (first_row + rows // GROUP)[:, None]
    loaded = used[:, None] & (dims < HEAD_DIM)[None, :]
    q_tile = tl.load(q + row_at * q_stride + within, mask=loaded, other=0.0)

    peak = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    mixed = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    cache += kv_head * head_stride
    table = tables + sequence * table_stride
    end = first_position + num_tokens
    # Keys that every row may see need no mask: all but those near the diagonal.
    seen_by_all = (first_position + 1) // TILE_KEYS * TILE_KEYS
    for begin in range(0, seen_by_all, TILE_KEYS):
        keys = begin + tl.arange(0, TILE_KEYS)
        peak, total, mixed = _fold(
            peak, total, mixed, q_tile, keys, row_positions, end, cache, table, table_step, block_stride, scale,
            BLOCK_SIZE, HEAD_DIM, PADDED_DIM, False,
        )  # fmt: skip
    for begin in range(seen_by_all, end, TILE_KEYS):
        keys = begin + tl.arange(0, TILE_KEYS)
        peak, total, mixed = _fold(
            peak, total, mixed, q_tile, keys, row_positions, end, cache, table, table_step, block_stride, scale,
            BLOCK_SIZE, HEAD_DIM, PADDED_DIM, True,
        )  # fmt: skip
    mixed = mixed / total[:, None]
    out_stride = KV_HEADS * GROUP * HEAD_DIM
    tl.store(out + row_at * out_stride + within, mixed.to(out.dtype.element_ty), mask=loaded)


@triton.jit
def _span(length, TILE_KEYS: tl.constexpr, SPAN_TILES: tl.constexpr, MAX_SPANS: tl.constexpr):
    """Keys in each span of a token that sees `length` of them: a function of its position alone."""
    tiles = (length + TILE_KEYS - 1) // TILE_KEYS
    return tl.maximum(SPAN_TILES, (tiles + MAX_SPANS - 1) // MAX_SPANS) * TILE_KEYS


@triton.jit(do_not_specialize=["num_tokens", "table_stride", "table_step", "q_stride"])
def attend_spans(
    out,
    part_mixed,
    part_softmax,
    q,
    cache,
    positions,
    tokens,
    tables,
    num_tokens,
    table_stride,
    table_step,
    q_stride,
    block_stride,
    head_stride,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SPAN_TILES: tl.constexpr,
    MAX_SPANS: tl.constexpr,
):
    """Program (token, KV head, span): one token against one span of its keys.

    A token with a single span is done; of others the parts are left for `merge_spans`. A position below 0 sees no
    keys. `tokens` is [2, num_tokens]: row, sequence. Parts, float32: `part_mixed` [num_tokens, heads, MAX_SPANS,
    HEAD_DIM], `part_softmax` [2, num_tokens, heads, MAX_SPANS]: peaks, totals.
    """
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    span_index = tl.program_id(2)
    row = tl.load(tokens + token)
    length = tl.load(positions + row).to(tl.int32) + 1
    span = _span(length, TILE_KEYS, SPAN_TILES, MAX_SPANS)
    first = span_index * span
    if first < length:
        end = tl.minimum(length, first + span)
        rows = tl.arange(0, TILE_ROWS)
        dims = tl.arange(0, PADDED_DIM)
        head = kv_head * GROUP + rows
        loaded = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        within = head[:, None] * HEAD_DIM + dims[None, :]
        q_tile = tl.load(q + row * q_stride + within, mask=loaded, other=0.0)

        peak = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
        mixed = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
        # Every row is the same token's: it sees all that is stored.
        row_positions = tl.zeros([TILE_ROWS], tl.int32) + (length - 1)
        layer_head = cache + kv_head * head_stride
        table = tables + tl.load(tokens + num_tokens + token) * table_stride
        whole = first + (end - first) // TILE_KEYS * TILE_KEYS
        for begin in range(first, whole, TILE_KEYS):
            keys = begin + tl.arange(0, TILE_KEYS)
            peak, total, mixed = _fold(
                peak, total, mixed, q_tile, keys, row_positions, end, layer_head, table, table_step, block_stride,
                scale, BLOCK_SIZE, HEAD_DIM, PADDED_DIM, False,
            )  # fmt: skip
        if whole < end:
            keys = whole + tl.arange(0, TILE_KEYS)
            peak, total, mixed = _fold(
                peak, total, mixed, q_tile, keys, row_positions, end, layer_head, table, table_step, block_stride,
                scale, BLOCK_SIZE, HEAD_DIM, PADDED_DIM, True,
            )  # fmt: skip
        if length <= span:
            mixed = mixed / total[:, None]
            out_stride = KV_HEADS * GROUP * HEAD_DIM
            tl.store(out + row * out_stride + within, mixed.to(out.dtype.element_ty), mask=loaded)
        else:
            part = (token * (KV_HEADS * GROUP) + head) * MAX_SPANS + span_index
            tl.store(part_mixed + part[:, None] * HEAD_DIM + dims[None, :], mixed, mask=loaded)
            tl.store(part_softmax + part, peak, mask=rows < GROUP)
            totals = part_softmax + num_tokens.to(tl.int64) * (KV_HEADS * GROUP * MAX_SPANS)
            tl.store(totals + part, total, mask=rows < GROUP)


@triton.jit(do_not_specialize=["num_tokens"])
def merge_spans(
    out,
    part_mixed,
    part_softmax,
    positions,
    tokens,
    num_tokens,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SPAN_TILES: tl.constexpr,
    MAX_SPANS: tl.constexpr,
):
    """Program (token, head): the parts of `attend_spans`, always summed in the same order."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(tokens + token)
    length = tl.load(positions + row).to(tl.int32) + 1
    span = _span(length, TILE_KEYS, SPAN_TILES, MAX_SPANS)
    if length > span:
        spans = tl.arange(0, MAX_SPANS)
        dims = tl.arange(0, PADDED_DIM)
        present = spans * span < length
        part = (token * HEADS + head) * MAX_SPANS + spans
        peaks = tl.load(part_softmax + part, mask=present, other=float("-inf"))
        totals = tl.load(part_softmax + num_tokens.to(tl.int64) * (HEADS * MAX_SPANS) + part, mask=present, other=0.0)
        loaded = present[:, None] & (dims < HEAD_DIM)[None, :]
        mixed = tl.load(part_mixed + part[:, None] * HEAD_DIM + dims[None, :], mask=loaded, other=0.0)
        shares = tl.exp2(peaks - tl.max(peaks, 0))
        merged = tl.sum(mixed * shares[:, None], 0) / tl.sum(totals * shares, 0)
        at = out + (row * HEADS + head) * HEAD_DIM + dims
        tl.store(at, merged.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


def max_shared_bytes(device_index: int) -> int:
    """Shared memory that a program may have."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device_index)["max_shared_mem"])
