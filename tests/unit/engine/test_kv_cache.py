"""Blocks as bytes: what travels is what was written, block by block."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.kv_cache import KVCache, KVLayout, bytes_per_block
from engine.kv_int8 import dequantize, quantize
from engine.model_config import ModelConfig
from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError
from pdmesh.kv_memory import memory_file
from pdmesh.types import MemoryFile
from tests.unit.engine.cuda_device import needs_cuda

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


@pytest.mark.parametrize("pack", [None, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_gathered_as_its_bytes_and_scales_say(
    config: ModelConfig, dtype: torch.dtype, pack: int | None
) -> None:
    cache = KVCache(
        config, num_blocks=5, block_size=8, dtype=dtype, device=CPU, kv_dtype=torch.int8, layout=KVLayout(pack)
    )
    assert cache.block_bytes == bytes_per_block(config, 8, torch.int8) == 3 * 2 * 2 * 8 * (16 + 4)
    assert cache.scales is not None
    tables = torch.tensor([[3, 1], [4, 2]])
    slots = (tables.unsqueeze(-1) * 8 + torch.arange(8)).flatten()
    k, v = torch.randn(2, 2, 16, 2, 16).to(dtype).unbind()
    cache.write(1, k.flatten(0, 1), v.flatten(0, 1), slots)
    for gathered, written in zip(cache.gather(1, tables), (k, v), strict=True):
        assert gathered.dtype == dtype
        assert torch.equal(gathered, dequantize(*quantize(written.transpose(1, 2)), dtype))
    # Of other layers and blocks nothing is written.
    assert torch.count_nonzero(cache.scales) == 2 * 2 * len(slots)
    assert torch.count_nonzero(cache.scales[tables.flatten(), :, 1]) == 2 * 2 * len(slots)


def test_int8_of_any_size_of_heads_and_blocks(config: ModelConfig) -> None:
    """Its scales, of four bytes, lie where they may."""
    odd = replace(config, head_dim=5)
    cache = KVCache(odd, num_blocks=2, block_size=3, dtype=torch.float32, device=CPU, kv_dtype=torch.int8)
    k, v = torch.randn(2, 3, 2, 5)
    cache.write(2, k, v, torch.arange(3, 6))
    keys, values = cache.gather(2, torch.tensor([[1]]))
    torch.testing.assert_close(keys[0].transpose(0, 1), k, rtol=0, atol=float(k.abs().max()) / 250)
    torch.testing.assert_close(values[0].transpose(0, 1), v, rtol=0, atol=float(v.abs().max()) / 250)


# Of three KV heads and three layers: by heads, as tensor-parallel ranks; by layers, as stages; by both.
REGIONS = {
    "heads": [(range(2), range(3)), (range(2, 3), range(3))],
    "layers": [(range(3), range(1)), (range(3), range(1, 3))],
    "both": [(heads, layers) for heads in (range(1), range(1, 3)) for layers in (range(2), range(2, 3))],
}


@pytest.fixture
def three_heads(config: ModelConfig) -> ModelConfig:
    return replace(config, num_heads=6, num_kv_heads=3)


@pytest.fixture
def file(three_heads: ModelConfig) -> Iterator[Callable[[torch.dtype], MemoryFile]]:
    """Room for five whole blocks of eight tokens."""
    descriptor = memory_file()
    yield lambda dtype: MemoryFile(descriptor, 5 * bytes_per_block(three_heads, 8, dtype))
    os.close(descriptor)


@pytest.mark.parametrize("regions", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("pack", [None, 1, 2])
def test_regions_of_one_memory_together_are_whole_blocks(
    three_heads: ModelConfig,
    file: Callable[[torch.dtype], MemoryFile],
    pack: int | None,
    kv_dtype: torch.dtype,
    regions: list[tuple[range, range]],
) -> None:
    dtype = torch.bfloat16 if kv_dtype == torch.int8 else kv_dtype

    def cache(kv_heads: range | None = None, layers: range | None = None, memory: MemoryFile | None = None) -> KVCache:
        return KVCache(
            three_heads,
            num_blocks=5,
            block_size=8,
            dtype=dtype,
            device=CPU,
            kv_dtype=kv_dtype,
            layout=KVLayout(pack),
            kv_heads=kv_heads,
            layers=layers,
            memory=memory,
        )

    whole, parts = cache(), [cache(*region, file(kv_dtype)) for region in regions]
    assert {part.block_bytes for part in parts} == {whole.block_bytes}
    assert {part.file for part in parts} == {file(kv_dtype)}
    tables = torch.tensor([[3, 1], [4, 2]])
    slots = (tables.unsqueeze(-1) * 8 + torch.arange(8)).flatten()
    k, v = torch.randn(2, 3, len(slots), 3, 16).to(dtype)
    for layer in range(3):
        whole.write(layer, k[layer], v[layer], slots)
    for part, (heads, layers) in zip(parts, regions, strict=True):
        assert (part.num_kv_heads, part.num_layers) == (len(heads), len(layers))
        for own, layer in enumerate(layers):
            part.write(own, k[layer][:, heads], v[layer][:, heads], slots)
    for part, (heads, layers) in zip(parts, regions, strict=True):
        for own, layer in enumerate(layers):
            expected = [kv[:, heads] for kv in whole.gather(layer, tables)]
            assert all(map(torch.equal, part.gather(own, tables), expected))
        for block in range(5):
            assert part.view(block) == whole.view(block)


def test_heads_are_one_run_of_a_block(three_heads: ModelConfig) -> None:
    """What travels between unlike numbers of ranks: of each block one piece for each rank."""
    cache = KVCache(three_heads, num_blocks=3, block_size=8, dtype=torch.float32, device=CPU, kv_heads=range(1, 3))
    cache.data.fill_(1)
    head_bytes = cache.block_bytes // 3
    assert not any(cache.view(2)[:head_bytes])
    assert bytes(cache.view(2)[head_bytes:]) == torch.ones(2 * head_bytes // 4).numpy().tobytes()


def test_a_region_writes_no_other_block_memory_than_its_own(three_heads: ModelConfig) -> None:
    cache = KVCache(
        three_heads,
        num_blocks=3,
        block_size=8,
        dtype=torch.float32,
        device=CPU,
        kv_heads=range(1, 2),
        layers=range(1, 2),
    )
    cache.write(0, torch.ones(24, 1, 16), torch.ones(24, 1, 16), torch.arange(24))
    tile_bytes = cache.block_bytes // (3 * 3)
    for block in range(3):
        written = torch.frombuffer(cache.view(block), dtype=torch.float32).view(3, 3, -1)
        assert bool(written[1, 1].all())
        assert int(written.count_nonzero()) == tile_bytes // 4


@pytest.mark.parametrize("part", [range(0), range(2, 4), range(-1, 1), range(0, 3, 2)])
def test_a_region_is_a_part_of_the_blocks(three_heads: ModelConfig, part: range) -> None:
    for kv_heads, layers in ((part, None), (None, part)):
        with pytest.raises(AssertionError, match="of 3"):
            KVCache(
                three_heads,
                num_blocks=1,
                block_size=8,
                dtype=torch.float32,
                device=CPU,
                kv_heads=kv_heads,
                layers=layers,
            )


@needs_cuda
def test_regions_on_devices_travel_as_whole_blocks(
    three_heads: ModelConfig, file: Callable[[torch.dtype], MemoryFile]
) -> None:
    memory = file(torch.bfloat16)
    parts = [
        KVCache(
            three_heads,
            num_blocks=5,
            block_size=8,
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
            kv_heads=kv_heads,
            layers=range(1, 3),
            memory=memory,
        )
        for kv_heads in (range(2), range(2, 3))
    ]
    for part in parts:
        assert part.data.is_contiguous()
        part.data.normal_()
        part.to_host([1, 3])
    whole = torch.frombuffer(parts[0].view(3), dtype=torch.bfloat16).view(3, 3, 2, 8, 16)
    assert torch.equal(whole[:, 1:], torch.cat([part.data[3].cpu() for part in parts]))
    assert not whole[:, 0].any()
    parts[0].view(4)[:] = parts[0].view(3)
    for part in parts:
        part.to_device([4])
        assert torch.equal(part.data[4], part.data[3])


def _plain_places(token: int, dims: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return token * 16 + dims, token * 16 + dims


def _dot_places(token: int, dims: torch.Tensor, pack: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (dims // pack * 8 + token) * pack + dims % pack, (token // pack * 16 + dims) * pack + token % pack


def test_more_than_memory_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"^no memory for a KV cache of .* GiB on cpu: configure fewer blocks$"):
        KVCache(config, num_blocks=2**40, block_size=16, dtype=torch.float32, device=CPU)
