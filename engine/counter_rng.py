"""Random numbers that are a pure function of where they are used: any worker draws the same ones, in any order.

The generator is "squares" (Widynski 2020, arXiv 2004.06278): four rounds of squaring and swapping halves turn a
64-bit counter and a 64-bit key into 32 random bits. No state, so nothing to hand over when a request moves.
"""

import hashlib

import torch

_LOW_32 = 0xFFFFFFFF


def stream_key(seed: int, completion_index: int) -> int:
    """The key of one completion's random numbers, as a signed 64-bit integer.

    Squares wants keys of irregular digits, which seeds like 0 and 1 are not: SHA-256 makes them so. The key is odd,
    so that counter * key meets every value once.
    """
    parts = b"pdmesh.sampling.v1\0" + seed.to_bytes(8, "little") + completion_index.to_bytes(4, "little")
    return int.from_bytes(hashlib.sha256(parts).digest()[:8], "little", signed=True) | 1


def squares32(counters: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """32 random bits for each counter, int64, in [0, 2^32); int64 `keys` are broadcast to `counters`.

    int64 products wrap as unsigned ones do, on every device; only the right shift must be made a logical one.
    """
    x = counters * keys
    y = x.clone()
    z = y + keys
    for addend in (y, z, y):
        x.mul_(x).add_(addend)
        x = _logical_shift_32(x).bitwise_or_(x << 32)
    return _logical_shift_32(x.mul_(x).add_(z))


def gumbel(counters: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64: -ln(-ln u) for u uniform over (0, 1) in steps of 2^-32."""
    uniform = squares32(counters, keys).double().add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_()


def _logical_shift_32(x: torch.Tensor) -> torch.Tensor:
    return (x >> 32).bitwise_and_(_LOW_32)
