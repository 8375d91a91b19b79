"""What bench/parallel makes of what it measured, and that it measures groups that compute."""

import os
from pathlib import Path

import pytest
import torch

from bench.engine.batches import plain_batch
from bench.engine.random_llama import llama_config
from bench.parallel import pipeline, sums
from bench.parallel.decode import Turns
from bench.parallel.figures import (
    decode_figures,
    decode_misses,
    memory_figures,
    memory_misses,
    pipeline_figures,
    pipeline_misses,
    sum_figures,
    sum_misses,
)
from bench.parallel.footprint import Footprint, RankMemory
from bench.parallel.groups import Group
from bench.parallel.leading import Leading
from bench.parallel.models import LLAMA_1B, LLAMA_135M, slice_of
from bench.parallel.others import ProcessorTimes, other_cores
from bench.parallel.pipeline import Times
from bench.parallel.proc import memory_of, parse_memory

MIB = 2**20
WHOLE = RankMemory(weights=2000, kv=100, runtime=300, loading=2300, share=2600, own=2400)
HALF = RankMemory(weights=1000, kv=50, runtime=300, loading=1200, share=1500, own=1300)


def test_a_slice_is_what_a_rank_has() -> None:
    part = slice_of(LLAMA_1B, 2)
    assert (part.num_heads, part.num_kv_heads, part.intermediate_size, part.vocab_size) == (16, 4, 4096, 16000)
    # What ranks do not share out.
    assert (part.hidden_size, part.head_dim, part.num_layers) == (2048, 64, 16)
    assert slice_of(LLAMA_135M, 3).num_heads == 3
    with pytest.raises(AssertionError, match="no equal parts for 3"):
        slice_of(LLAMA_1B, 3)


def test_speed_is_judged_beside_ranks_that_never_talk() -> None:
    figures = decode_figures({8: Turns(alone=[0.2, 0.1, 0.9], together=[0.16, 0.15, 0.16], apart=[0.125, 0.1, 0.2])})
    assert figures[8]["alone_tokens_per_s"] == pytest.approx(40)
    assert figures[8]["together_tokens_per_s"] == pytest.approx(50)
    assert figures[8]["speedup"] == pytest.approx(1.25)
    assert figures[8]["limit"] == pytest.approx(1.6)
    assert figures[8]["share_of_limit"] == pytest.approx(0.78125)
    (miss,) = decode_misses(2, figures)
    assert "8 requests: 1.25 times" in miss
    assert decode_misses(2, decode_figures({8: Turns([0.17], [0.1], [0.1])})) == []


def test_memory_is_judged_by_the_rank_that_has_most() -> None:
    smaller = RankMemory(weights=900, kv=50, runtime=300, loading=1000, share=1400, own=1200)
    figures = memory_figures({1: Footprint((WHOLE,), 400), 2: Footprint((smaller, HALF), 400)})
    assert figures[2]["said_share"] == pytest.approx(0.5)
    assert figures[2]["own_share"] == pytest.approx(1300 / 2400)
    assert figures[2]["pss_share"] == pytest.approx(1500 / 2600)
    assert figures[2]["loading_ratio"] == pytest.approx(1200 / 1400)
    assert figures[1]["said_share"] == 1
    assert memory_misses(figures) == []
    large = memory_figures({1: Footprint((WHOLE,), 50), 2: Footprint((WHOLE, WHOLE), 50)})
    assert len(memory_misses(large)) == 4


def test_sums_are_judged_by_one_hidden_state() -> None:
    figures = sum_figures({"ours": {2**18: [1e-3], 2048: [6e-6]}, "gloo": {2**18: [2e-3], 2048: [1e-5]}})
    assert figures[2048]["ratio"] == pytest.approx(0.6)
    assert figures[2**18]["ours_gib_per_s"] == pytest.approx(1000 / 1024)
    (miss,) = sum_misses(figures)
    assert "0.60 of Gloo's time" in miss
    assert sum_misses(sum_figures({"ours": {2048: [4e-6]}, "gloo": {2048: [1e-5]}})) == []


def test_a_pipeline_is_ideal_where_stages_wait_only_to_fill_it() -> None:
    figures = pipeline_figures({1: Times([1.0], [0.5], [1.0]), 8: Times([1.6], [0.8], [1.0])})
    assert figures[1]["ratio"] == pytest.approx(1.0)
    # Nine times an eighth of a stage's time.
    assert figures[8]["ideal_ms"] == pytest.approx(900)
    (miss,) = pipeline_misses(512, figures)
    assert "1.11 of the ideal time" in miss
    assert pipeline_misses(512, {8: {"ratio": 1.1}}) == []


def test_memory_of_a_process_is_read() -> None:
    memory = parse_memory(
        "Name:\tpython\nVmHWM:\t    300 kB\nVmRSS:\t    200 kB\nThreads:\t2\n",
        "00400000-7fff ---p 00000000 00:00 0 [rollup]\nPss:  150 kB\nPss_Anon:  90 kB\nPss_Shmem:  10 kB\n",
    )
    assert (memory.resident, memory.most_resident, memory.share) == (200 << 10, 300 << 10, 150 << 10)
    assert (memory.anonymous, memory.shared) == (90 << 10, 10 << 10)
    before = memory_of(os.getpid())
    # So much that what others of this process let go of meanwhile is little beside it.
    held = torch.ones(256 * MIB, dtype=torch.uint8)
    assert memory_of(os.getpid()).anonymous - before.anonymous > 240 * MIB
    del held


def test_others_are_whoever_is_not_ours() -> None:
    before = ProcessorTimes(clock=1.0, everybody=100.0, own=10.0)
    assert other_cores(before, ProcessorTimes(clock=5.0, everybody=107.0, own=15.0)) == pytest.approx(0.5)
    assert other_cores(before, ProcessorTimes(clock=5.0, everybody=104.0, own=14.01)) == 0


def test_a_plain_batch_has_blocks_of_its_own_and_wants_the_last_states() -> None:
    batch = plain_batch([3, 1], [0, 20])
    assert batch.positions.tolist() == [0, 1, 2, 20]
    assert batch.slot_mapping.tolist() == [0, 1, 2, 52]
    assert batch.seq_lens.tolist() == [3, 21]
    assert batch.output_rows().tolist() == [2, 3]  # type: ignore[union-attr]


@pytest.mark.e2e
def test_a_group_says_what_it_has_and_decodes(tiny_model: Path) -> None:
    leading = Leading(
        tp=2, model=str(tiny_model), dtype="float32", prompt_tokens=20, max_num_seqs=2, num_blocks=16, max_len=96
    )
    with Group(leading) as group:
        group.wait_ready()
        assert [rank["rank"] for rank in group.ranks] == [0, 1]
        assert len({rank["pid"] for rank in group.ranks}) == 2
        assert group.before_bytes > 10 * MIB
        group.decode(1)
        group.decode(2)
        group.begin(5)
        assert 0 < group.seconds() < 60


@pytest.mark.e2e
def test_sums_of_two_processes_are_right_and_timed() -> None:
    times = sums.measure(1, lambda what: None)
    assert set(times) == {"ours", "gloo"}
    assert all(len(seconds) == 1 and 0 < seconds[0] < 10 for sizes in times.values() for seconds in sizes.values())


@pytest.mark.e2e
@pytest.mark.slow
def test_a_pipeline_computes_every_cut_of_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.parallel.models.bench_cache", lambda: tmp_path)
    model = llama_config(
        "tiny", vocab_size=320, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2
    )
    times = pipeline.measure(model, "float32", prompts=(512,), rounds=1, say=lambda what: None)
    assert set(times[512]) == {1, 2, 4, 8}
    assert all(len(one.alone) == len(one.apart) == len(one.pipeline) == 1 for one in times[512].values())
