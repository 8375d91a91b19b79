"""Which bytes of a block a node holds: those that its ranks' caches write, and no other."""

import os
import struct
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.engine.random_llama import TINY
from engine.kv_cache import PLAIN, KVCache, KVLayout, bytes_per_block
from engine.model_config import ModelConfig
from engine.parallel.kv_runs import held_runs
from engine.parallel.shard import shard_of
from pdmesh.errors import ConfigError
from pdmesh.kv_memory import memory_file
from pdmesh.types import BlockRun, MemoryFile

BLOCK_SIZE = 4
NUM_BLOCKS = 3
CPU = torch.device("cpu")
# Neither as float32 or bfloat16, nor as 127 in 8 bits, nor its scale then.
NO_ZERO_BYTE = struct.unpack("<f", b"\x01\x02\x03\x3f")[0]


@st.composite
def splits(draw: st.DrawFn) -> tuple[ModelConfig, int, int, int]:
    """A model, and degrees at which it can be split over so many nodes."""
    num_kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    config = replace(
        TINY,
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * group,
        num_layers=draw(st.integers(1, 5)),
        head_dim=8,
    )
    possible = [(tp, pp) for tp in range(1, 17) for pp in range(1, 6) if _splits(config, tp, pp)]
    tp, pp = draw(st.sampled_from(possible))
    nnodes = draw(st.sampled_from([count for count in range(1, tp * pp + 1) if tp * pp % count == 0]))
    return config, tp, pp, nnodes


def _splits(config: ModelConfig, tp: int, pp: int) -> bool:
    try:
        shard_of(config, tp=tp, pp=pp)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    ("layout", "dtype", "kv_dtype"),
    [
        (PLAIN, torch.float32, None),
        (KVLayout(1), torch.float32, None),
        (KVLayout(2), torch.bfloat16, None),
        (KVLayout(2), torch.bfloat16, torch.int8),
    ],
)
@given(splits())
def test_a_node_holds_what_the_caches_of_its_ranks_write(
    layout: KVLayout, dtype: torch.dtype, kv_dtype: torch.dtype | None, split: tuple[ModelConfig, int, int, int]
) -> None:
    config, tp, pp, nnodes = split
    block_bytes = bytes_per_block(config, BLOCK_SIZE, kv_dtype or dtype)
    layer_bytes = block_bytes // (config.num_layers * config.num_kv_heads)
    shards = [shard_of(config, tp=tp, pp=pp, rank=rank) for rank in range(tp * pp)]
    held_by_all = bytearray(block_bytes)
    for node in range(nnodes):
        of_node = shards[node * len(shards) // nnodes :][: len(shards) // nnodes]
        file = MemoryFile(memory_file(), NUM_BLOCKS * block_bytes)
        os.ftruncate(file.descriptor, file.num_bytes)
        try:
            for shard in of_node:
                cache = KVCache(
                    config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=dtype, device=CPU, kv_dtype=kv_dtype,
                    layout=layout,
                    kv_heads=shard.kv_heads, layers=shard.layers, memory=file,
                )  # fmt: skip
                values = torch.full((BLOCK_SIZE, len(shard.kv_heads), config.head_dim), NO_ZERO_BYTE, dtype=dtype)
                slots = torch.arange(BLOCK_SIZE, 2 * BLOCK_SIZE)
                for layer in range(len(shard.layers)):
                    cache.write(layer, values, values, slots)
            written = [bytes(map(bool, cache.view(block_id))) for block_id in range(NUM_BLOCKS)]
        finally:
            os.close(file.descriptor)
        runs = held_runs(of_node, config.num_layers, layer_bytes)
        expected = bytearray(block_bytes)
        for run in runs:
            expected[run.offset_bytes : run.end_bytes] = b"\1" * run.num_bytes
            held_by_all[run.offset_bytes : run.end_bytes] = b"\1" * run.num_bytes
        assert written == [bytes(block_bytes), bytes(expected), bytes(block_bytes)]
        assert all(run.end_bytes < after.offset_bytes for run, after in pairwise(runs))
    assert all(held_by_all), "between them the nodes hold every byte"


def test_a_node_with_all_ranks_holds_blocks_whole() -> None:
    shards = [shard_of(TINY, tp=2, pp=2, rank=rank) for rank in range(4)]
    block_bytes = TINY.num_layers * TINY.num_kv_heads * 100
    assert held_runs(shards, TINY.num_layers, 100) == (BlockRun(0, block_bytes),)
