"""The attention kernels, on a device or in Triton's interpreter, against `AttentionPlan`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from engine.attention import AttentionPlan, Scores
from engine.batch import Batch
from engine.decoder_config import AlibiPositions, DecoderLayers, NormConfig
from engine.kv_cache import KVCache
from engine.model_config import ModelConfig
from tests.unit.engine.cuda_device import kernel_device, needs_cuda

DEVICE = kernel_device()

# After the skip: these import Triton.
from engine.cuda.attention_work import attention_work  # noqa: E402
from engine.cuda.paged_attention import DeviceStep, PagedAttention, TritonAttention  # noqa: E402

# Triton's interpreter has no bfloat16.
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=needs_cuda)]
NUM_LAYERS = 2
LAYER = 1


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            name="attention alone",
            architecture="LlamaForCausalLM",
            vocab_size=1,
            hidden_size=1,
            intermediate_size=1,
            num_layers=NUM_LAYERS,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position=1 << 14,
            tie_word_embeddings=True,
            eos_token_ids=(),
            bos_token_id=None,
            layers=DecoderLayers(NormConfig("rms", 1e-6), AlibiPositions()),
        )


class Ragged:
    """A step of sequences in a cache whose blocks are scattered, and NaN wherever no token is."""

    def __init__(
        self,
        shape: Shape,
        sequences: Sequence[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        *,
        region: bool = False,
    ) -> None:
        """With `region`, the cache holds but some heads and layers of its blocks: not the first, not the last."""
        self.shape = shape
        self.sequences = list(sequences)
        generator = torch.Generator().manual_seed(len(sequences))
        block_size = shape.block_size
        query_lens = np.array([query_len for query_len, _ in sequences])
        seq_lens = np.array([query_len + context_len for query_len, context_len in sequences])
        blocks_each = -(-seq_lens // block_size)
        order = torch.split(torch.randperm(int(blocks_each.sum()), generator=generator) + 1, blocks_each.tolist())
        tables = torch.zeros(len(sequences), int(blocks_each.max()), dtype=torch.int64)
        for table, blocks in zip(tables, order, strict=True):
            table[: len(blocks)] = blocks
        config, kv_heads, layers = shape.config, range(shape.num_kv_heads), range(NUM_LAYERS)
        if region:
            config = replace(config, num_kv_heads=shape.num_kv_heads + 2, num_layers=NUM_LAYERS + 2)
            kv_heads, layers = range(1, shape.num_kv_heads + 1), range(1, NUM_LAYERS + 1)
        self.cache = KVCache(
            config,
            num_blocks=int(blocks_each.sum()) + 1,
            block_size=block_size,
            dtype=dtype,
            device=DEVICE,
            kv_heads=kv_heads,
            layers=layers,
        )
        self.cache.data.fill_(torch.nan)
        for table, query_len, seq_len in zip(tables, query_lens, seq_lens, strict=True):
            past = torch.arange(seq_len - query_len)
            stored = torch.randn(len(past), shape.num_kv_heads, NUM_LAYERS, 2, shape.head_dim, generator=generator).to(
                DEVICE, dtype
            )
            self.cache.data[table[past // block_size].to(DEVICE), :, :, :, (past % block_size).to(DEVICE)] = stored
        positions = torch.cat([torch.arange(end - n, end) for n, end in zip(query_lens, seq_lens, strict=True)])
        owners = torch.from_numpy(np.repeat(np.arange(len(sequences)), query_lens))
        slots = tables[owners, positions // block_size] * block_size + positions % block_size
        self.batch = Batch(
            input_ids=torch.zeros_like(positions).to(DEVICE),
            positions=positions.to(DEVICE),
            slot_mapping=slots.to(DEVICE),
            query_lens=query_lens,
            seq_lens=seq_lens,
            block_tables=tables.to(DEVICE),
            output_lens=query_lens,
        )
        self.q, self.k, self.v = (
            torch.randn(len(positions), heads, shape.head_dim, generator=generator).to(DEVICE, dtype)
            for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )

    def attend(self, *sequences: int) -> torch.Tensor:
        """By the kernels: the outputs of the named sequences, a step of their own, or of all."""
        batch = self.batch
        members = list(sequences or range(len(self.sequences)))
        owners = np.repeat(np.arange(len(self.sequences)), batch.query_lens)
        rows = torch.from_numpy(np.concatenate([np.flatnonzero(owners == member) for member in members])).to(DEVICE)
        paged = PagedAttention(
            self.cache,
            num_heads=self.shape.num_heads,
            max_keys=batch.block_tables.shape[1] * self.cache.block_size,
        )
        work = attention_work(batch.query_lens[members], batch.seq_lens[members], paged.tile_tokens)
        step = DeviceStep(
            positions=batch.positions[rows],
            slot_mapping=batch.slot_mapping[rows],
            block_tables=batch.block_tables[torch.tensor(members, device=DEVICE)],
            tokens=torch.from_numpy(work.tokens).to(DEVICE),
            tiles=torch.from_numpy(work.tiles).to(DEVICE),
        )
        q, k, v = (part[rows] if sequences else part for part in (self.q, self.k, self.v))
        return TritonAttention(paged, step).attend(LAYER, q, k, v, Scores(q.shape[2] ** -0.5))

    def expected(self) -> torch.Tensor:
        return AttentionPlan(self.batch, self.cache).attend(
            LAYER, self.q, self.k, self.v, Scores(self.q.shape[2] ** -0.5)
        )


# Chunks and decodes side by side; odd lengths; a prompt's first tokens; ends on a block's edge, a tile's, a span's.
MIX = [(1, 0), (7, 3), (40, 20), (1, 300), (2, 129), (70, 0), (1, 127), (5, 59), (4, 60), (1, 128)]


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_a_ragged_step_equals_plain_attention(group: int, num_kv_heads: int) -> None:
    ragged = Ragged(Shape(group * num_kv_heads, num_kv_heads, 32), MIX)
    torch.testing.assert_close(ragged.attend(), ragged.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32, 5])
def test_any_head_and_block_size(head_dim: int, block_size: int) -> None:
    ragged = Ragged(Shape(4, 2, head_dim, block_size), [(1, 200), (9, 33), (3, 0)])
    torch.testing.assert_close(ragged.attend(), ragged.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_half_precision_is_near_single(dtype: torch.dtype, head_dim: int) -> None:
    ragged = Ragged(Shape(8, 2, head_dim), MIX, dtype)
    exact = Ragged(Shape(8, 2, head_dim), MIX)
    exact.q, exact.k, exact.v = ragged.q.float(), ragged.k.float(), ragged.v.float()
    exact.cache.data.copy_(ragged.cache.data)
    error = (ragged.attend().float() - exact.expected()).abs().max()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.004)


@pytest.mark.parametrize("context_len", [4095, 4096, 4100, 6000])
def test_long_decodes_are_read_in_longer_spans(context_len: int) -> None:
    ragged = Ragged(Shape(3, 1, 16), [(1, context_len), (1, 40)])
    torch.testing.assert_close(ragged.attend(), ragged.expected(), rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_what_else_is_in_the_step() -> None:
    ragged = Ragged(Shape(6, 2, 32), MIX)
    together = torch.split(ragged.attend(), ragged.batch.query_lens.tolist())
    for sequence, rows in enumerate(together):
        assert torch.equal(ragged.attend(sequence), rows), ragged.sequences[sequence]


def test_a_region_of_blocks_gives_the_same_bits() -> None:
    region, whole = (Ragged(Shape(4, 2, 24), MIX, region=region) for region in (True, False))
    assert torch.equal(region.attend(), whole.attend())
    assert torch.equal(region.cache.data.nan_to_num(7), whole.cache.data.nan_to_num(7))


def test_keys_and_values_are_stored_where_the_slots_say() -> None:
    ragged = Ragged(Shape(4, 2, 24), MIX)
    before = ragged.cache.data.clone()
    ragged.attend()
    stored = ragged.cache.data.clone()
    blocks, offsets = ragged.batch.slot_mapping // 16, ragged.batch.slot_mapping % 16
    assert torch.equal(stored[blocks, :, LAYER, 0, offsets], ragged.k)
    assert torch.equal(stored[blocks, :, LAYER, 1, offsets], ragged.v)
    stored[blocks, :, LAYER, :, offsets] = torch.nan
    assert torch.equal(stored.nan_to_num(), before.nan_to_num())


def test_padding_writes_nowhere() -> None:
    ragged = Ragged(Shape(4, 2, 16), [(1, 200), (1, 30), (6, 3)])
    ragged.batch = replace(
        ragged.batch,
        slot_mapping=torch.full_like(ragged.batch.slot_mapping, -1),
        positions=torch.full_like(ragged.batch.positions, -1),
    )
    before = ragged.cache.data.clone()
    ragged.attend(0, 1)
    assert torch.equal(ragged.cache.data.nan_to_num(), before.nan_to_num())


def test_queries_keys_and_values_may_be_parts_of_one_matrix() -> None:
    ragged = Ragged(Shape(4, 2, 16), [(1, 200), (6, 3)])
    expected = ragged.attend()
    matrix = torch.cat((ragged.q, ragged.k, ragged.v), dim=1)
    ragged.q, ragged.k, ragged.v = torch.split(matrix, [4, 2, 2], dim=1)
    ragged.cache.data[ragged.batch.slot_mapping // 16, :, LAYER, :, ragged.batch.slot_mapping % 16] = torch.nan
    assert torch.equal(ragged.attend(), expected)
