import math

import torch

from engine.counter_rng import gumbel, squares32, stream_key
from tests.unit.engine.plain_squares import plain_squares32


def test_equals_the_plain_function() -> None:
    """Over counters of many outputs and tokens, and keys of either sign."""
    for key in (stream_key(0, 0), stream_key(1, 0), stream_key(2**64 - 1, 15), 0x548C9DECBCE65297):
        counters = [index << 32 | token for index in (0, 1, 77, 2**31 - 1) for token in (0, 1, 49151, 2**22)]
        counter_tensor = torch.tensor(counters)
        drawn = squares32(counter_tensor, torch.full_like(counter_tensor, key)).tolist()
        assert drawn == [plain_squares32(counter, key % 2**64) for counter in counters]
        assert counter_tensor.tolist() == counters, "the counters were written over"


def test_known_answers() -> None:
    """Fixed for ever: other numbers would give every seeded request other tokens."""
    assert stream_key(0, 0) != stream_key(0, 1) != stream_key(1, 0)
    counters = torch.tensor([0, 1, 1 << 32, (5 << 32) | 49151])
    drawn = squares32(counters, torch.full_like(counters, stream_key(42, 0)))
    assert drawn.tolist() == [254166799, 2669900808, 2604575707, 3308407451]


def test_uniform_by_chi_square() -> None:
    """100 000 draws into 100 bins, over tokens of one output and over outputs of one token."""
    for counters in (torch.arange(100_000), torch.arange(100_000) << 32):
        drawn = squares32(counters, torch.full_like(counters, stream_key(7, 0)))
        counts = torch.bincount(drawn * 100 >> 32, minlength=100).double()
        chi_square = float(((counts - 1000) ** 2 / 1000).sum())
        # 99 degrees of freedom: 0.1 % of random sequences lie below 60, and 0.1 % above 149.
        assert 60 < chi_square < 149


def test_gumbel_has_its_mean_and_variance() -> None:
    counters = torch.arange(100_000)
    noise = gumbel(counters, torch.full_like(counters, stream_key(3, 1)))
    assert noise.dtype == torch.float64
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.57722) < 4 * (math.pi**2 / 6 / 100_000) ** 0.5
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.04
