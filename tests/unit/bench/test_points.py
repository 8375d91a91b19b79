import json

import pytest

from bench.engine.points import Point, compare, parse_point, spread
from bench.engine.roofline import Limits, Work
from pdmesh.errors import ConfigError

# 10 tokens a second by arithmetic, 20 by bytes.
WORK = Work(num_tokens=1, flops=100.0, num_bytes=50.0)
LIMITS = Limits(bandwidth_bytes_per_s=1000.0, gemm_flops_per_s=1000.0)


@pytest.mark.parametrize("name", ["prefill_512", "decode_b8"])
def test_names_are_read_as_they_are_written(name: str) -> None:
    assert parse_point(name).name == name


@pytest.mark.parametrize("name", ["prefill_", "prefill_0", "decode_8", "decode_b-1", "prefill_x", "b8", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="prefill_N or decode_bN"):
        parse_point(name)


def test_short_prompts_are_measured_several_at_a_time() -> None:
    assert Point("prefill", 128).request(7) == {"prefill": 128, "prompts": 8, "seed": 7}
    assert Point("prefill", 2048).request(7) == {"prefill": 2048, "prompts": 1, "seed": 7}


def test_engines_are_loaded_for_as_much_as_is_asked() -> None:
    for point in (Point("prefill", 512), Point("decode", 32)):
        request = point.request(0)
        assert point.max_len == (request.get("prefill") or request["prompt"]) + request.get("tokens", 1)
    assert Point("decode", 32).num_sequences == 32


def test_a_point_beside_peers() -> None:
    rounds = {"ours": [4.0, 5.0, 9.0], "slow": [1.0, 2.0, 3.0], "fast": [2.0, 4.0, 100.0]}
    report = compare(rounds, WORK, LIMITS)
    assert report["ours"] == 5.0
    assert report["peers"] == {"slow": 2.0, "fast": 4.0}
    assert report["ratio_to_best"] == 1.25
    assert report["limit"] == pytest.approx(10.0)
    assert report["share_of_limit"] == pytest.approx(0.5)
    assert report["spread"] == {"ours": 1.0, "slow": 1.0, "fast": 24.5}
    assert json.loads(json.dumps(report))["rounds"] == rounds


def test_a_point_without_peers_has_no_ratio() -> None:
    report = compare({"ours": [5.0]}, WORK, LIMITS)
    assert report["ratio_to_best"] is None
    assert report["peers"] == {}


def test_spread() -> None:
    assert spread([3.0]) == 0
    assert spread([9.0, 10.0, 12.0]) == pytest.approx(0.3)
