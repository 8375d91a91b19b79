"""Blocks as bytes: what travels is what was written, block by block."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.kv_cache import KVCache, KVLayout, bytes_per_block
from engine.model_config import ModelConfig
from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_llama: Callable[[str], Path]) -> ModelConfig:
    return open_checkpoint(str(tiny_llama("gqa"))).config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_is_one_run_of_bytes(config: ModelConfig, dtype: torch.dtype) -> None:
    cache = KVCache(config, num_blocks=5, block_size=8, dtype=dtype, device=CPU)
    cache.data.normal_()
    block = cache.view(3)
    assert (block.format, block.ndim, block.readonly) == ("B", 1, False)
    assert len(block) == cache.block_bytes == bytes_per_block(config, 8, dtype) == 3 * 2 * 2 * 8 * 16 * dtype.itemsize
    assert bytes(block) == cache.data[3].view(torch.uint8).numpy().tobytes()


def test_a_view_writes_the_cache(config: ModelConfig) -> None:
    source, target = (KVCache(config, num_blocks=4, block_size=8, dtype=torch.bfloat16, device=CPU) for _ in range(2))
    source.data.normal_()
    target.data.zero_()
    source.to_host([1, 2])
    target.view(3)[:] = source.view(1)
    target.to_device([3])
    assert torch.equal(target.data[3], source.data[1])
    assert not target.data[:3].any()


@pytest.mark.parametrize("block_id", [-1, 4])
def test_there_is_no_block_past_the_end(config: ModelConfig, block_id: int) -> None:
    cache = KVCache(config, num_blocks=4, block_size=8, dtype=torch.float32, device=CPU)
    with pytest.raises(AssertionError):
        cache.view(block_id)


@pytest.mark.parametrize("pack", [None, 1, 2])
def test_tokens_lie_where_their_slots_say(config: ModelConfig, pack: int | None) -> None:
    layout = KVLayout(pack)
    cache = KVCache(config, num_blocks=4, block_size=8, dtype=torch.float32, device=CPU, layout=layout)
    cache.data.fill_(torch.nan)
    slots = torch.tensor([3 * 8 + 7, 1 * 8 + 0])
    k, v = torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    cache.write(2, k, v, slots)
    for token, (block, offset) in enumerate([(3, 7), (1, 0)]):
        keys, values = cache.data[block, :, 2].flatten(2).unbind(1)
        dims = torch.arange(16)
        in_keys, in_values = _plain_places(offset, dims) if pack is None else _dot_places(offset, dims, pack)
        assert torch.equal(keys[:, in_keys], k[token])
        assert torch.equal(values[:, in_values], v[token])
    assert int(cache.data.isfinite().sum()) == k.numel() + v.numel()


@pytest.mark.parametrize("pack", [None, 1, 2])
def test_what_was_written_is_gathered_in_the_order_of_the_tables(config: ModelConfig, pack: int | None) -> None:
    layout = KVLayout(pack)
    cache = KVCache(config, num_blocks=5, block_size=8, dtype=torch.bfloat16, device=CPU, layout=layout)
    tables = torch.tensor([[3, 1], [4, 2]])
    k, v = torch.randn(2, 2, 16, 2, 16).to(torch.bfloat16).unbind()
    slots = (tables.unsqueeze(-1) * 8 + torch.arange(8)).flatten()
    cache.write(1, k.flatten(0, 1), v.flatten(0, 1), slots)
    keys, values = cache.gather(1, tables)
    assert torch.equal(keys, k.transpose(1, 2))
    assert torch.equal(values, v.transpose(1, 2))


def _plain_places(token: int, dims: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return token * 16 + dims, token * 16 + dims


def _dot_places(token: int, dims: torch.Tensor, pack: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (dims // pack * 8 + token) * pack + dims % pack, (token // pack * 16 + dims) * pack + token % pack


def test_more_than_memory_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"^no memory for a KV cache of .* GiB on cpu: configure fewer blocks$"):
        KVCache(config, num_blocks=2**40, block_size=16, dtype=torch.float32, device=CPU)
