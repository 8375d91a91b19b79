"""bench/transfer moves real bytes between real processes, and compares what is to be compared."""

import pytest

from bench.transfer.__main__ import ratios
from bench.transfer.measure import Samples, measure
from kvstore.transfer.transports import TRANSPORTS


async def test_every_way_moves_blocks_to_another_process() -> None:
    rounds: list[int] = []
    figures = await measure(
        num_blocks=3, block_bytes=300_000, rounds=2, small={"one_block": 1, "1024_tokens": 2}, on_round=rounds.append
    )
    assert rounds == [0, 1, 2]
    assert set(figures) == {"memcpy", "bare unix", "bare tcp", "bare grpc", *TRANSPORTS}
    for way in figures.values():
        assert set(way) == {"gib_per_s", "cpu_s_per_gib", "one_block_ms", "1024_tokens_ms"}
        assert all(figure > 0 for figure in way.values())
    assert set(ratios(figures)) == set(TRANSPORTS)


def test_figures_are_medians_for_each_gib() -> None:
    samples = Samples([1.0, 2.0, 9.0], [0.5, 0.25, 0.75], {"one_block": [0.003, 0.001, 0.002]})
    figures = samples.figures(1 << 29)
    assert figures == pytest.approx({"gib_per_s": 0.25, "cpu_s_per_gib": 1.0, "one_block_ms": 2.0})


def test_a_transport_is_compared_with_its_yardstick() -> None:
    way = {"gib_per_s": 2.0, "cpu_s_per_gib": 0.5}
    bare = {"gib_per_s": 4.0, "cpu_s_per_gib": 0.25}
    figures = {
        "memcpy": way,
        "bare unix": bare,
        "shm": way,
        "bare tcp": bare,
        "tcp": way,
        "bare grpc": way,
        "grpc": way,
    }
    compared = ratios(figures)
    assert compared["tcp"] == {"to": "bare tcp", "cpu_to": "bare tcp", "gib_per_s": 0.5, "cpu_s_per_gib": 2.0}
    assert compared["grpc"] == {"to": "bare grpc", "cpu_to": "bare grpc", "gib_per_s": 1.0, "cpu_s_per_gib": 1.0}
    assert compared["shm"] == {"to": "memcpy", "cpu_to": "bare unix", "gib_per_s": 1.0, "cpu_s_per_gib": 2.0}
