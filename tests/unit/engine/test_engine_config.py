from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import CacheSize, EngineConfig, available_memory_bytes, cache_size
from pdmesh.errors import ConfigError

GIB = 1 << 30
BLOCK_BYTES = 1 << 20


def config(**values: Any) -> EngineConfig:
    return EngineConfig(**{"model": "m", "device": "cpu", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 0}, "block_size is 0: must be at least 1"),
        ({"max_num_seqs": -1}, "max_num_seqs is -1"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"num_blocks": 5, "kv_cache_bytes": 5}, "give one of them"),
        (
            {"max_num_seqs": 65, "max_num_batched_tokens": 64},
            "max_num_seqs is 65, more than max_num_batched_tokens, 64",
        ),
    ],
)
def test_values_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**values)


def test_auto_is_float32_on_cpu() -> None:
    assert config().dtype_name == "float32"
    assert config(dtype="bfloat16").dtype_name == "bfloat16"
    assert config().torch_device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        assert config(device="cuda").torch_device


@pytest.mark.parametrize(
    ("values", "free", "size"),
    [
        # 1 GiB, if that is no more than half of what is free.
        ({}, 8 * GIB, CacheSize(1024, 8192)),
        ({}, 1 * GIB, CacheSize(512, 8192)),
        # No more than two full batches of the longest requests can use.
        ({"max_model_len": 64, "max_num_seqs": 4}, 8 * GIB, CacheSize(32, 64)),
        # A cache that holds less than the model's length limits that.
        ({"num_blocks": 10}, 8 * GIB, CacheSize(10, 160)),
        ({"kv_cache_bytes": 10 * BLOCK_BYTES + 1}, 8 * GIB, CacheSize(10, 160)),
        ({"num_blocks": 10, "max_model_len": 160}, 8 * GIB, CacheSize(10, 160)),
        # What was asked for may take more than half.
        ({"num_blocks": 1000}, 1 * GIB, CacheSize(1000, 8192)),
    ],
)
def test_size_of_the_cache(values: dict[str, Any], free: int, size: CacheSize) -> None:
    assert cache_size(config(**values), BLOCK_BYTES, 8192, free) == size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_blocks": 2000}, "would take 1.95 GiB and 1.00 GiB are free: lower num_blocks"),
        ({"kv_cache_bytes": 1000}, "room for no block of 1048576 bytes: raise kv_cache_bytes"),
        ({"max_model_len": 9000}, "max_model_len is 9000: the model was made for 8192 tokens"),
        ({"num_blocks": 10, "max_model_len": 161}, "max_model_len is 161 and the KV cache holds 160 tokens"),
    ],
)
def test_sizes_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cache_size(config(**values), BLOCK_BYTES, 8192, 1 * GIB)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux tells what is free")
def test_available_memory_is_less_than_all_there_is() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < available_memory_bytes(torch.device("cpu")) < int(total.split()[1]) * 1024
