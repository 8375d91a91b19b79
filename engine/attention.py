"""Attention over the paged KV cache, for any mix of prefill chunks and decodes in one step.

    plan = AttentionPlan(batch, kv_cache)     once per step: groups, indices, masks
    plan.attend(layer, q, k, v, scores)       per layer: write K and V, read the blocks, attend

Sequences are put into groups of like shape. A group's sequences are padded to its longest and attended in one call,
so that a step of many decodes takes a few calls per layer. Padding and the unwritten tail of a last block may hold
anything, NaN included: after reading they are overwritten with zeros, and the mask keeps them out of the softmax.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from engine.batch import Batch
from engine.kv_cache import KVCache

# A sequence joins a group if that pads no member by more than a half, or by more than some blocks: a call costs
# about as much as reading a hundred tokens.
_MAX_PADDING_RATIO = 1.5
_FREE_PADDING_TOKENS = 128


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences attended in one call: N of them, each with Q tokens in this step, over M blocks that hold S tokens.

    Attributes:
        query_rows: [N * Q], rows of the step's tokens.
        block_tables: [N, M].
        unwritten: [N, 1, S, 1], where slots lie past their sequence's end.
        query_positions: [N, Q], on the host.
    """

    query_rows: torch.Tensor
    block_tables: torch.Tensor
    unwritten: torch.Tensor
    query_positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer scores keys: what becomes of the products of queries and keys before their softmax.

    Attributes:
        scale: They are multiplied by this.
        window: How many keys a token sees, its own among them; None: all up to its own.
        soft_cap: Then each becomes soft_cap * tanh(score / soft_cap); None: stays as it is.
        slopes: Of each query head: then to each is added the slope times how far the key lies behind the token, as a
            number of at most 0 (ALiBi). Empty: nothing is added.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    slopes: tuple[float, ...] = ()


class Attention(Protocol):
    """The attention of one step: made for one batch, asked by each layer in turn.

    Attributes:
        kv_cache: Where the K and V of the batch's sequences lie.
    """

    @property
    def kv_cache(self) -> KVCache: ...

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Stores the step's K and V and attends to what the sequences have.

        Args:
            q: [T, num_heads, head_dim], rotated.
            k, v: [T, num_kv_heads, head_dim]; k rotated.
            scores: Of this layer.

        Returns:
            [T, num_heads, head_dim].
        """
        ...


class AttentionPlan:
    """Attention by torch's own operations, on any device.

    What one step needs and no layer changes is made once. Serves the one forward pass it was built for.
    """

    def __init__(self, batch: Batch, kv_cache: KVCache) -> None:
        self.kv_cache = kv_cache
        self._slot_mapping = batch.slot_mapping
        self._groups = [_build_group(batch, kv_cache, members) for members in _grouped(batch)]
        self._masks: dict[int | None, list[torch.Tensor]] = {}
        rows = torch.cat([group.query_rows for group in self._groups])
        # Outputs come group by group; this brings them back into the order of the step's tokens.
        self._order = torch.empty_like(rows).index_copy_(0, rows, torch.arange(len(rows), device=rows.device))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        self.kv_cache.write(layer, k, v, self._slot_mapping)
        masks = self._masks_of(scores.window)
        outputs = [
            self._attend_group(layer, q, group, mask, scores) for group, mask in zip(self._groups, masks, strict=True)
        ]
        return torch.cat(outputs).index_select(0, self._order)

    def _masks_of(self, window: int | None) -> list[torch.Tensor]:
        """Of each group; made as the first layer of this window asks for them."""
        if window not in self._masks:
            self._masks[window] = [_mask(group, self.kv_cache, window) for group in self._groups]
        return self._masks[window]

    def _attend_group(
        self, layer: int, q: torch.Tensor, group: _Group, mask: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """[N * Q, num_heads, head_dim], in the order of the group's `query_rows`."""
        num_heads, head_dim = q.shape[1:]
        num_kv_heads = self.kv_cache.num_kv_heads
        keys, values = self.kv_cache.gather(layer, group.block_tables)
        keys.masked_fill_(group.unwritten, 0.0)
        values.masked_fill_(group.unwritten, 0.0)
        queries = q.index_select(0, group.query_rows).view(len(keys), -1, num_heads, head_dim)
        if scores.soft_cap is not None or scores.slopes:
            output = _attend_scored(queries, keys, values, mask, group.query_positions, scores)
        elif queries.shape[1] == 1:
            # The query heads that share a KV head become its queries, so that K and V are read once for all.
            queries = queries.view(len(keys), num_kv_heads, -1, head_dim)
            output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scores.scale)
        else:
            output = F.scaled_dot_product_attention(
                queries.transpose(1, 2),
                keys,
                values,
                attn_mask=mask,
                scale=scores.scale,
                enable_gqa=num_heads != num_kv_heads,
            ).transpose(1, 2)
        return output.reshape(-1, num_heads, head_dim)


def _attend_scored(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    scores: Scores,
) -> torch.Tensor:
    """Attention whose scores torch's own cannot compute: written out, in float32.

    Args:
        queries: [N, Q, num_heads, head_dim].
        keys, values: [N, num_kv_heads, S, head_dim].
        mask: [N, 1, Q, S].
        positions: Of the queries, [N, Q], on the host.

    Returns:
        [N, Q, num_heads, head_dim].
    """
    num_sequences, query_len, num_heads, head_dim = queries.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    # [N, KV heads, query heads of each, Q, head_dim]
    by_kv_head = queries.view(num_sequences, query_len, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    products = by_kv_head.float() @ keys.float().unsqueeze(2).transpose(-1, -2)
    scored = products.view(num_sequences, num_heads, query_len, num_keys) * scores.scale
    if scores.soft_cap is not None:
        scored = torch.tanh(scored / scores.soft_cap) * scores.soft_cap
    if scores.slopes:
        distances = (torch.arange(num_keys) - positions.unsqueeze(-1)).to(queries.device, torch.float32)
        scored += distances.unsqueeze(1) * torch.tensor(scores.slopes, device=queries.device).view(-1, 1, 1)
    weights = torch.softmax(scored + mask, dim=-1).view(products.shape)
    mixed = (weights @ values.float().unsqueeze(2)).to(queries.dtype)
    return mixed.view(num_sequences, num_heads, query_len, head_dim).transpose(1, 2)


def _grouped(batch: Batch) -> Iterator[list[int]]:
    """Indices of sequences, group by group: equal query_len, like seq_len."""
    shapes = list(zip(batch.query_lens.tolist(), batch.seq_lens.tolist(), strict=True))
    group: list[int] = []
    for index in sorted(range(len(shapes)), key=shapes.__getitem__):
        if group and not _fits(shapes[index], shapes[group[0]]):
            yield group
            group = []
        group.append(index)
    yield group


def _fits(shape: tuple[int, int], shortest: tuple[int, int]) -> bool:
    query_len, seq_len = shape
    longest = max(shortest[1] * _MAX_PADDING_RATIO, shortest[1] + _FREE_PADDING_TOKENS)
    return query_len == shortest[0] and seq_len <= longest


def _build_group(batch: Batch, kv_cache: KVCache, members: list[int]) -> _Group:
    # Index arithmetic happens on the host, where the lengths are; only results go to the device.
    device = kv_cache.device
    starts = torch.from_numpy(batch.query_lens.cumsum() - batch.query_lens)
    query_len = int(batch.query_lens[members[0]])
    seq_lens = torch.from_numpy(batch.seq_lens[members])
    num_blocks = -(-int(seq_lens.max()) // kv_cache.block_size)
    slots = torch.arange(num_blocks * kv_cache.block_size)

    queries = torch.arange(query_len)
    query_rows = starts[members].unsqueeze(-1) + queries
    query_positions = (seq_lens - query_len).unsqueeze(-1) + queries
    unwritten = slots >= seq_lens.unsqueeze(-1)
    return _Group(
        query_rows=query_rows.flatten().to(device),
        block_tables=batch.block_tables[torch.tensor(members, device=device), :num_blocks],
        unwritten=unwritten[:, None, :, None].to(device),
        query_positions=query_positions,
    )


def _mask(group: _Group, kv_cache: KVCache, window: int | None) -> torch.Tensor:
    """[N, 1, Q, S] in the cache's dtype, 0 where a query may look and -inf elsewhere."""
    positions = group.query_positions.unsqueeze(-1)
    slots = torch.arange(group.unwritten.shape[2])
    hidden = slots > positions
    if window is not None:
        hidden |= slots <= positions - window
    mask = torch.zeros(hidden.shape, dtype=kv_cache.dtype).masked_fill_(hidden, float("-inf"))
    return mask.unsqueeze(1).to(kv_cache.device)
