"""Choosing tokens with the kernels: kernels/sampling.cpp behind the sampler's seam."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from engine.sampling_ops import Draws, not_finite
from pdmesh.types import TokenLogprob

# Rows of scratch are whole blocks of tokens long: kernels/sampling.cpp, kBlock.
_BLOCK = 64


class _Logits(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, logits: torch.Tensor) -> "_Logits":
        assert logits.dtype == torch.float32
        assert logits.device.type == "cpu"
        assert logits.stride(1) == 1 or logits.shape[1] == 1
        return cls(logits.data_ptr(), *logits.shape, logits.stride(0))


class _Draws(ctypes.Structure):
    _fields_ = (
        ("num_draws", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("temperatures", ctypes.c_void_p),
        ("floors", ctypes.c_void_p),
        ("top_ks", ctypes.c_void_p),
        ("top_ps", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("scratch_stride", ctypes.c_int64),
    )


class CpuSampling:
    """Implements SamplingOps for logits on the host. Chooses what TorchSampling does, but for sums' last bits.

    Args:
        path: The kernels; see engine/cpu/build.py.
        num_threads: Rows worked on at once.
    """

    def __init__(self, path: Path, *, vocab_size: int, num_threads: int) -> None:
        library = ctypes.CDLL(str(path))
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._likeliest = library["pdmesh_likeliest"]
        self._likeliest.argtypes = [pointer, pointer, ctypes.c_int32]
        self._likeliest.restype = count
        self._draw = library["pdmesh_draw"]
        self._draw.argtypes = [pointer, pointer, pointer, ctypes.c_int32]
        self._draw.restype = None
        self._logprobs = library["pdmesh_logprobs"]
        self._logprobs.argtypes = [pointer, pointer, pointer, count, pointer, pointer, ctypes.c_int32]
        self._logprobs.restype = None
        self._num_threads = num_threads
        self._scratch = np.empty((num_threads, 2, -(-vocab_size // _BLOCK) * _BLOCK), np.float32)

    def likeliest(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        token_ids = np.empty(len(logits), np.int64)
        rows = _Logits.of(logits)
        if self._likeliest(ctypes.addressof(rows), token_ids.ctypes.data, self._num_threads_for(len(logits))):
            raise not_finite()
        return token_ids

    def draw(self, logits: torch.Tensor, draws: Draws) -> npt.NDArray[np.int64]:
        assert logits.shape[1] <= self._scratch.shape[2]
        num_draws = len(draws.rows)
        token_ids = np.empty(num_draws, np.int64)
        rows = _Logits.of(logits)
        # In the order of the structure's fields.
        columns = (
            draws.rows,
            draws.temperatures,
            draws.floors,
            draws.top_ks,
            draws.top_ps,
            draws.keys,
            draws.counters,
        )
        assert all(column.flags.c_contiguous for column in columns)
        asked = _Draws(num_draws, *(column.ctypes.data for column in columns), self._scratch.ctypes.data)
        asked.scratch_stride = self._scratch.shape[2]
        num_threads = self._num_threads_for(num_draws)
        self._draw(ctypes.addressof(rows), ctypes.addressof(asked), token_ids.ctypes.data, num_threads)
        return token_ids

    def logprobs(self, logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
        num_rows, num_top = len(logits), min(num_top, logits.shape[1])
        chosen_ids = np.array(token_ids, np.int64)
        chosen = np.empty(num_rows, np.float32)
        top_ids, tops = np.empty((num_rows, num_top), np.int64), np.empty((num_rows, num_top), np.float32)
        rows = _Logits.of(logits)
        self._logprobs(
            ctypes.addressof(rows),
            chosen_ids.ctypes.data,
            chosen.ctypes.data,
            num_top,
            top_ids.ctypes.data,
            tops.ctypes.data,
            self._num_threads_for(num_rows),
        )
        return [
            TokenLogprob(token_id, logprob, tuple(zip(*top, strict=True)))
            for token_id, logprob, *top in zip(token_ids, chosen.tolist(), top_ids.tolist(), tops.tolist(), strict=True)
        ]

    def _num_threads_for(self, num_rows: int) -> int:
        return min(self._num_threads, num_rows)
