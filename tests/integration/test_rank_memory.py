"""Ranks share out a model's weights and KV cache, and loading takes little more than what is loaded."""

import sys
from pathlib import Path

import pytest
import torch

from bench.engine.random_llama import TINY, llama_config, write_random_llama
from engine.api import RankInfo
from tests.rank_groups import Arrival, config, group_of_ranks, serve
from tests.rank_groups import arrivals as all_arrivals

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

# A quarter of a billion parameters, in the proportions of the models that have a billion.
MODEL = llama_config(
    "random-llama-250m",
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=12,
    num_heads=16,
    num_kv_heads=8,
)
# Of one rank's weights and KV.
MAX_SHARE = 0.55


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_llama(MODEL, "bfloat16", tmp_path_factory.mktemp("model"), torch.device("cpu"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_llama(TINY, "bfloat16", tmp_path_factory.mktemp("small"), torch.device("cpu"))


def measure(source: Path, tp: int) -> tuple[tuple[RankInfo, ...], int]:
    """The ranks of a group that has answered a request, and the peak of the last one's memory in bytes."""
    [arrival, *_] = all_arrivals()
    with group_of_ranks(config(source, dtype="bfloat16", num_blocks=1000), tp=tp) as assembly:
        serve(assembly.core, [Arrival(0, arrival.prompt[:20], arrival.sampling)])
        return assembly.ranks, _peak_bytes(assembly.ranks[-1].pid)


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_a_rank_of_two_takes_half(model: Path, small: Path) -> None:
    [alone], _ = measure(model, tp=1)
    (_, of_small), small_peak_bytes = measure(small, tp=2)
    ranks, peak_bytes = measure(model, tp=2)
    assert alone.weight_bytes > 0.99 * sum(file.stat().st_size for file in model.glob("*.safetensors"))
    for rank in ranks:
        assert rank.weight_bytes <= MAX_SHARE * alone.weight_bytes
        assert rank.kv_bytes <= MAX_SHARE * alone.kv_bytes
    largest_file_bytes = max(file.stat().st_size for file in model.glob("*.safetensors"))
    # Beyond what any follower takes: the interpreter, torch, shared memory.
    loading_bytes = peak_bytes - (small_peak_bytes - of_small.weight_bytes)
    assert ranks[1].weight_bytes < loading_bytes <= ranks[1].weight_bytes + largest_file_bytes
