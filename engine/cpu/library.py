"""The kernels' C interface: structures as kernels/decoder.cpp has them, and calls that leave the interpreter free."""

import ctypes
from enum import IntEnum
from pathlib import Path

import torch

# Before the kernels: torch brings its OpenMP, and a second one beside it would mean twice the threads.
assert torch.__version__


class Kind(IntEnum):
    """What an operation does."""

    EMBED = 0
    NORMALIZE = 1
    PROJECT = 2
    ATTEND = 3
    SELECT = 4


class Finish(IntEnum):
    """What becomes of a product's sums: stored, added to the output, a gate's SiLU times the other factor, or q turned
    to the output and turned k and v to the KV cache."""

    STORE = 0
    ADD = 1
    SILU_MULTIPLY = 2
    ROTATE = 3


class Operation(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("finish", ctypes.c_int32),
        ("outputs_only", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("input", ctypes.c_void_p),
        ("input_bytes", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("output_bytes", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
    )


class Decoder(ctypes.Structure):
    _fields_ = (
        ("cache", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("layer_stride", ctypes.c_int64),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("score_scale", ctypes.c_float),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("num_sequences", ctypes.c_int64),
        ("max_blocks", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("query_lens", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("output_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
    )


class Kernels:
    """The compiled kernels for one type of weights.

    Args:
        path: The library; see engine/cpu/build.py.
        dtype: float32 or bfloat16.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        library = ctypes.CDLL(str(path))
        name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
        self.dtype = dtype
        self._run = library[f"pdmesh_run_{name}"]
        self._run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int32]
        self._run.restype = None
        self._pack = library[f"pdmesh_pack_{name}"]
        self._pack.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 5
        self._pack.restype = None

    def run(self, decoder: Decoder, step: Step, operations: "ctypes.Array[Operation]", num_threads: int) -> None:
        """Runs the operations one after the other, by `num_threads` threads. Pointers must be valid; nothing checks."""
        pointers = (ctypes.addressof(decoder), ctypes.addressof(step), ctypes.addressof(operations))
        self._run(*pointers, len(operations), num_threads)

    def pack(self, packed: torch.Tensor, matrix: torch.Tensor, base: int, group: int, stride: int) -> None:
        """Stores `matrix` [n, k] in a packed one of as many columns: row i as its row
        base + i // group * stride + i % group."""
        assert matrix.is_contiguous()
        assert matrix.dtype == packed.dtype == self.dtype
        self._pack(packed.data_ptr(), matrix.data_ptr(), *matrix.shape, base, group, stride)
