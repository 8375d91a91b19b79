"""What bench/loading makes of what it measured."""

import pytest

from bench.loading.bandwidth import Bandwidth
from bench.loading.figures import load_figures, offload_figures


def test_loading_is_compared_turn_by_turn() -> None:
    ours = [{"load_s": 1.0, "first_token_s": first, "peak_bytes": 110.0 + first} for first in (1.2, 2.4, 6.0)]
    theirs = [{"load_s": 0.1, "first_token_s": first} for first in (2.0, 6.0, 8.0)]
    figures = load_figures(ours, theirs, 100)
    assert figures.ratio == pytest.approx(0.6)
    assert (figures.first_token_s, figures.their_first_token_s) == (2.4, 6.0)
    assert figures.over_weights_bytes == pytest.approx(16.0)


@pytest.mark.parametrize(
    ("bandwidth", "bound"),
    # Memory's speed, the cache's, and a disk that is faster than the cache.
    [(Bandwidth(None, 100.0), 4.0), (Bandwidth(5.0, 10.0), 1.0), (Bandwidth(20.0, 10.0), 2.0)],
)
def test_off_loaded_speed_is_bound_by_the_slower(bandwidth: Bandwidth, bound: float) -> None:
    whole, offloaded = [{"step_s": 0.25}], [{"step_s": 1.0, "resident_bytes": 7.0}]
    figures = offload_figures(offloaded, whole, 10, bandwidth)
    assert figures.bound_per_s == pytest.approx(bound)
    assert figures.ratio == pytest.approx(1.0 / bound)
