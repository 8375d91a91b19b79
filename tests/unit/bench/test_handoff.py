"""What bench/handoff makes of what it measured, and that it measures two processes on a core each."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.handoff.figures import Answer, Round, misses, p90, summarise
from bench.handoff.measure import Setting, measure
from bench.handoff.pinning import pin

# Of the tiny model: 16 tokens, three layers, K and V, two heads of 16, float32.
_BLOCK_BYTES = 16 * 3 * 2 * 2 * 16 * 4
# Steps of 10, 20 and 12 ms, the second token 30 ms after the first.
ANSWER = Answer((1.0, 1.03, 1.04, 1.06, 1.072), kv_bytes=3 << 20, prefill_s=0.9, transfer_s=0.95)


def test_a_step_is_what_lies_between_later_tokens() -> None:
    assert ANSWER.step_s == pytest.approx(0.012)
    assert ANSWER.second_token_s == pytest.approx(0.030)
    assert ANSWER.second_token_steps == pytest.approx(2.5)


def test_figures_are_medians() -> None:
    slow = replace(ANSWER, token_s=(4.0, 4.012, 4.024, 4.036))
    figures = summarise([Round(0.8, ANSWER), Round(1.0, ANSWER), Round(5.0, slow)])
    assert figures["alone_ttft_ms"] == pytest.approx(1000)
    assert figures["mesh_ttft_ms"] == pytest.approx(1000)
    assert figures["ttft_ratio"] == pytest.approx(1.0)
    assert figures["ttft_ratio_p90"] == pytest.approx(1.25)
    assert figures["second_token_ms"] == pytest.approx(30)
    assert figures["decode_step_ms"] == pytest.approx(12)
    assert figures["kv_mib"] == pytest.approx(3)
    assert figures["transfer_ms"] == pytest.approx(950)


def test_nine_in_ten() -> None:
    assert p90([float(value) for value in range(10, 0, -1)]) == 9
    assert p90([1.0, 3.0, 2.0]) == 3
    assert p90([7.0]) == 7


def test_targets_that_are_missed_are_named() -> None:
    assert misses({"ttft_ratio": 1.05, "second_token_steps": 2.0}) == []
    ttft, second = misses({"ttft_ratio": 1.06, "second_token_steps": 2.1})
    assert "1.060" in ttft
    assert "2.10 decode steps" in second


def test_pins_every_thread() -> None:
    cores = sorted(os.sched_getaffinity(0))
    program = "import threading; threading.Thread(target=input).start(); print(flush=True); threading.Event().wait(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            threads = [int(entry.name) for entry in Path(f"/proc/{process.pid}/task").iterdir()]
            assert len(threads) == 2
            pin(process.pid, cores[-1])
            assert [os.sched_getaffinity(thread) for thread in threads] == [{cores[-1]}] * 2
        finally:
            process.kill()


@pytest.mark.e2e
async def test_measures_a_mesh(tiny_model: Path) -> None:
    core = min(os.sched_getaffinity(0))
    setting = Setting(
        str(tiny_model),
        "float32",
        prompt_tokens=100,
        output_tokens=4,
        rounds=2,
        # 22 blocks: three prompts.
        kv_cache_bytes=22 * _BLOCK_BYTES,
        prefill_core=core,
        decode_core=core,
    )
    said: list[str] = []
    rounds = await measure(setting, "tcp", said.append)
    assert said[-1] == "tcp: round 6 of 4 to warm up and 2 that count"
    assert [one.mesh.kv_bytes for one in rounds] == [7 * _BLOCK_BYTES] * 2
    assert all(0 < one.alone_s < 60 and len(one.mesh.token_s) == 4 for one in rounds)
