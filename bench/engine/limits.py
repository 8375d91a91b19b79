"""The machine's limits, measured beside the engines: how fast memory is read, and how fast matrices are multiplied.

Each is the best of several ways to do it, tried several times: an engine cannot well exceed it.
"""

import time
from collections.abc import Callable

import torch

from bench.engine.roofline import Limits

_TRIES = 4
# Values read, and rows of the square matrices multiplied. Far more than any cache holds, on both kinds of device.
_CPU_SIZES = (2**26, 2048)
_CUDA_SIZES = (2**29, 8192)


class LimitProbe:
    """Holds the memory that it reads: 256 MiB on a CPU, 2 GiB on a GPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        if device.type == "cpu":
            torch.set_num_threads(threads)
        self._device = device
        num_values, rows = _CPU_SIZES if device.type == "cpu" else _CUDA_SIZES
        self._values = torch.ones(num_values, device=device)
        self._left, self._right = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))

    @torch.inference_mode()
    def sample(self) -> Limits:
        """Takes about half a second."""
        values, left, right = self._values, self._left, self._right
        num_bytes = values.numel() * values.element_size()
        reads: list[Callable[[], object]] = [values.sum, values.amax, lambda: torch.dot(values, values)]
        products: list[Callable[[], object]] = [lambda: left @ right, lambda: left @ right.T]
        return Limits(
            bandwidth_bytes_per_s=num_bytes / min(map(self._best_s, reads)),
            gemm_flops_per_s=2 * left.shape[0] ** 3 / min(map(self._best_s, products)),
        )

    def _best_s(self, operation: Callable[[], object]) -> float:
        """The shortest time of an operation."""
        best_s = float("inf")
        for _ in range(_TRIES):
            self._finish()
            began = time.perf_counter()
            operation()
            self._finish()
            best_s = min(best_s, time.perf_counter() - began)
        return best_s

    def _finish(self) -> None:
        """Waits for what was started: a GPU's kernels run on while Python does."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def best(samples: list[Limits]) -> Limits:
    """The limits that no sample exceeds."""
    return Limits(
        bandwidth_bytes_per_s=max(sample.bandwidth_bytes_per_s for sample in samples),
        gemm_flops_per_s=max(sample.gemm_flops_per_s for sample in samples),
    )
