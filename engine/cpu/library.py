"""The kernels' C interface: structures as kernels/operation.h has them, and calls that leave the interpreter free."""

import ctypes
from enum import IntEnum
from pathlib import Path

import torch

from engine.weights.checkpoint import FileRows
from engine.weights.quantized import FORMATS, QuantizedWeight

# Before the kernels: torch brings its OpenMP, and a second one beside it would mean twice the threads.
assert torch.__version__


class Kind(IntEnum):
    """What an operation does."""

    EMBED = 0
    RMS_NORM = 1
    PROJECT = 2
    ATTEND = 3
    SELECT = 4
    REDUCE = 5
    FINISH_HEADS = 6
    LAYER_NORM = 7
    NARROW = 8
    ADD_POSITIONS = 9
    ROUTE = 10
    GATHER = 11
    PROJECT_EXPERTS = 12
    COMBINE_EXPERTS = 13
    CAP = 14


class Finish(IntEnum):
    """What becomes of results: in float32 stored, or added to the output; in the weights' type, for a product to read,
    stored as they are, behind an activation, or a gate's activation times the other factor; or turned q to the output,
    and turned k and v to the KV cache."""

    STORE = 0
    ADD = 1
    NARROW = 2
    ACTIVATE = 3
    ACTIVATE_MULTIPLY = 4
    PROJECT_HEADS = 5


class Activation(IntEnum):
    """What an MLP applies to its sums, or to its gate."""

    NONE = 0
    SILU = 1
    RELU = 2
    GELU = 3
    GELU_TANH = 4


class Rotation(ctypes.Structure):
    _fields_ = (
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("num_turned", ctypes.c_int64),
    )


class ScoreRule(ctypes.Structure):
    _fields_ = (
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("slopes", ctypes.c_void_p),
    )


class Format(IntEnum):
    """Of a matrix: packed values of the activations' type, fewer bits, or the addresses of its rows."""

    ELEMENT = 0
    INT8 = 1
    INT4 = 2
    ROWS = 3


class Operation(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("finish", ctypes.c_int32),
        ("outputs_only", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("whole_shares", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("input", ctypes.c_void_p),
        ("input_bytes", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("output_bytes", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("rank_bytes", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("num_experts", ctypes.c_int64),
        ("rotation", ctypes.POINTER(Rotation)),
        ("scores", ScoreRule),
    )


class Group(ctypes.Structure):
    """The ranks of one host that share layers; memory that they share, and this rank's place among them."""

    _fields_ = (
        ("given_up", ctypes.c_void_p),
        ("met", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("num_meetings", ctypes.c_uint32),
    )


class Decoder(ctypes.Structure):
    _fields_ = (
        ("cache", ctypes.c_void_p),
        ("int8_cache", ctypes.c_int32),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("layer_stride", ctypes.c_int64),
        ("group", ctypes.POINTER(Group)),
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


class Source(ctypes.Structure):
    """Rows of a matrix in memory (file -1, offset the address), or in a file. See kernels/packing.cpp."""

    _fields_ = (
        ("file", ctypes.c_int32),
        ("encoding", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
    )


# kernels/packing.cpp: Encoding.
_ENCODINGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class PackStatus(IntEnum):
    """What packing came to, where the system did not refuse to read (an errno, above zero)."""

    PACKED = 0
    NOT_FINITE = -1
    CUT_SHORT = -2


class Meetings:
    """How ranks of one host wait for each other; calls leave the interpreter free. The words lie in shared memory."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._all_reduce = library["pdmesh_all_reduce"]
        self._all_reduce.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self._all_reduce.restype = ctypes.c_int32
        self._post = library["pdmesh_post"]
        self._post.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self._post.restype = None
        self._wait = library["pdmesh_wait"]
        self._wait.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p]
        self._wait.restype = ctypes.c_int32

    def all_reduce(self, group: Group, values: torch.Tensor) -> bool:
        """Sums contiguous float32 values over the group, in place. False if the group was given up."""
        assert values.dtype == torch.float32
        assert values.is_contiguous()
        return bool(self._all_reduce(ctypes.addressof(group), values.data_ptr(), values.numel()))

    def post(self, word: int, value: int) -> None:
        """Says that the word at an address has come to `value`."""
        self._post(word, value & 0xFFFFFFFF)

    def wait(self, word: int, value: int, given_up: int) -> bool:
        """Waits for a word to come to `value`. False if the group was given up meanwhile."""
        return bool(self._wait(word, value & 0xFFFFFFFF, given_up))


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
        self._pack.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        self._pack.argtypes += [ctypes.c_void_p, ctypes.c_int32]
        self._pack.restype = ctypes.c_int64
        self._check_rows = library[f"pdmesh_check_rows_{name}"]
        self._check_rows.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_int32]
        self._check_rows.restype = ctypes.c_int64
        self._pack_quantized = {name: library[f"pdmesh_pack_{name}"] for name in FORMATS}
        for pack in self._pack_quantized.values():
            pack.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 3]
            pack.restype = None

    def run(self, decoder: Decoder, step: Step, operations: "ctypes.Array[Operation]", num_threads: int) -> None:
        """Runs the operations one after the other, by `num_threads` threads. Pointers must be valid; nothing checks."""
        pointers = (ctypes.addressof(decoder), ctypes.addressof(step), ctypes.addressof(operations))
        self._run(*pointers, len(operations), num_threads)

    def pack(
        self, packed: torch.Tensor, k: int, rows: torch.Tensor, source: torch.Tensor | FileRows, num_threads: int
    ) -> int:
        """Stores rows of a matrix in a packed one of as many inputs `k`, converted to its type.

        Args:
            rows: int64; of each of the packed matrix' outputs, padding too, which row of the source it is; negative
                where it stays as it is.
            source: [rows, k], or where such rows lie in a file.

        Returns:
            A `PackStatus`, or the system's error number where the file cannot be read.
        """
        assert packed.dtype == self.dtype
        assert rows.dtype == torch.int64
        assert rows.is_contiguous()
        if isinstance(source, torch.Tensor):
            assert source.stride(1) == 1 or k == 1
            offset, row_bytes = source.data_ptr(), source.stride(0) * source.itemsize
            place = Source(-1, _ENCODINGS[source.dtype], offset, row_bytes)
        else:
            place = Source(source.file.descriptor, _ENCODINGS[source.dtype], source.offset, source.row_bytes)
        status: int = self._pack(packed.data_ptr(), k, rows.data_ptr(), len(rows), ctypes.addressof(place), num_threads)
        return status

    def check_rows(self, address: int, num_rows: int, row_bytes: int, k: int, num_threads: int) -> int:
        """Brings rows of k values of the kernels' dtype, in a mapped file, into memory, and says, as `pack` does,
        whether they can be computed with."""
        status: int = self._check_rows(address, num_rows, row_bytes, k, num_threads)
        return status

    def pack_quantized(self, packed: torch.Tensor, rows: torch.Tensor, source: QuantizedWeight) -> None:
        """As `pack`, of a quantised matrix in a packed one of its format."""
        assert rows.dtype == torch.int64
        assert rows.is_contiguous()
        n, k = source.shape
        assert int(rows.max()) < n
        self._pack_quantized[source.format.name](packed.data_ptr(), k, rows.data_ptr(), len(rows), *_addresses(source))


class QuantizeKernels:
    """The compiled quantiser: what engine/weights/quantized.py computes, bit for bit, many times faster."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._quantize = {name: library[f"pdmesh_quantize_{name}"] for name in FORMATS}
        for quantize in self._quantize.values():
            quantize.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 3]
            quantize.restype = None

    def __call__(self, rows: torch.Tensor, to: QuantizedWeight) -> None:
        """Quantises float32 rows [m, k] to all of `to`, as `quantize_rows` does."""
        assert rows.dtype == torch.float32
        assert rows.is_contiguous()
        assert rows.shape == to.shape
        self._quantize[to.format.name](rows.data_ptr(), *rows.shape, *_addresses(to))


def _addresses(quantized: QuantizedWeight) -> list[int]:
    """Of values, scales and minima; 0 where there are none."""
    parts = (quantized.values, quantized.scales, quantized.minima)
    assert all(part is None or part.is_contiguous() for part in parts)
    return [0 if part is None else part.data_ptr() for part in parts]
