"""Matrices as the kernels read them, from memory and straight from files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.cpu.build import BuildError, kernels_path, this_target
from engine.cpu.library import Kernels, PackStatus
from engine.cpu.packing import PACK, PANEL, padded
from engine.weights.checkpoint import FileRows
from engine.weights.weight_file import WeightFile
from pdmesh.errors import ConfigError
from tests.texts import load, packed_for

try:
    KERNELS = {dtype: Kernels(kernels_path(this_target()), dtype) for dtype in PACK}
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)
DTYPES = pytest.mark.parametrize("dtype", PACK)
STORED = pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])


def unpacked(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The matrix [n, k], by the layout that kernels/matrix.h describes."""
    pack = PACK[packed.dtype]
    panels = packed.view(padded(n) // PANEL, padded(k, pack) // pack, PANEL, pack)
    return panels.transpose(1, 2).reshape(padded(n), padded(k, pack))[:n, :k]


def in_file(path: Path, matrix: torch.Tensor) -> FileRows:
    """Behind some bytes that are not its own."""
    path.write_bytes(b"abcdef" + matrix.contiguous().view(torch.uint8).numpy().tobytes())
    return FileRows(WeightFile(path), matrix.dtype, 6, matrix.stride(0) * matrix.itemsize, (range(len(matrix)),))


@DTYPES
@STORED
# Whole vectors and panels, none, and rows that are cut into pieces.
@pytest.mark.parametrize(("n", "k"), [(64, 64), (37, 50), (1, 1), (5, 33), (33, 9001)])
def test_values_are_converted_and_lie_where_they_belong(
    tmp_path: Path, dtype: torch.dtype, stored: torch.dtype, n: int, k: int
) -> None:
    matrix = torch.randn(n + 3, k, generator=torch.Generator().manual_seed(0)).mul(1e-3).to(stored)
    # Some rows, in another order than they lie in.
    rows = torch.cat([torch.arange(3, n // 2 + 3), torch.arange(n // 2 + 3, n + 3).flip(0)])
    for place in (matrix, in_file(tmp_path / "matrix", matrix)):
        packed = torch.zeros(padded(n) * padded(k, PACK[dtype]), dtype=dtype)
        assert KERNELS[dtype].pack(packed, k, rows, place, num_threads=2) == PackStatus.PACKED
        assert torch.equal(unpacked(packed, n, k), matrix[rows].to(dtype))


@DTYPES
def test_columns_and_outputs_that_are_not_meant_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = torch.randn(20, 40).to(dtype)
    part = matrix[:, 7:30]
    rows = torch.arange(20)
    rows[torch.tensor([0, 4, 19])] = -1
    packed = torch.full((padded(20) * padded(23, PACK[dtype]),), 5.0, dtype=dtype)
    assert KERNELS[dtype].pack(packed, 23, rows, part, num_threads=1) == PackStatus.PACKED
    expected = part.clone()
    expected[rows < 0] = 5.0
    assert torch.equal(unpacked(packed, 20, 23), expected)


@DTYPES
@STORED
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (18, 36), (7, 31)])
def test_what_is_not_finite_is_found(
    dtype: torch.dtype, stored: torch.dtype, value: float, place: tuple[int, int]
) -> None:
    matrix = torch.randn(19, 37).to(stored)
    matrix[place] = value
    packed = torch.zeros(padded(19) * padded(37, PACK[dtype]), dtype=dtype)
    status = KERNELS[dtype].pack(packed, 37, torch.arange(19), matrix, num_threads=2)
    assert status == PackStatus.NOT_FINITE


def test_a_value_that_bfloat16_rounds_to_infinity_is_found() -> None:
    matrix = torch.full((2, 2), torch.finfo(torch.float32).max)
    packed = torch.zeros(padded(2) * 2, dtype=torch.bfloat16)
    assert KERNELS[torch.bfloat16].pack(packed, 2, torch.arange(2), matrix, num_threads=1) == PackStatus.NOT_FINITE


@pytest.fixture
def single(tiny_llama: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model in one file, to damage."""
    return shutil.copytree(tiny_llama("gqa"), tmp_path / "single")


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight"])
def test_nan_is_refused_with_its_tensor(single: Path, packs: bool, name: str) -> None:
    file = single / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        packed_for(load(single, "bfloat16", stored=packs), KERNELS[torch.bfloat16])
    assert caught.value.message == f"{file}: tensor {name} holds NaN or infinity: get the file anew"


def test_a_file_that_shrinks_while_it_is_read(single: Path) -> None:
    file = single / "model.safetensors"
    loaded = load(single, stored=True)
    first = next(iter(loaded.stored.values()))
    assert first.rows() is not None, "open from here on"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ConfigError, match=rf"^{file}: ends within tensor .*: get the file anew"):
        packed_for(loaded, KERNELS[torch.float32])


def test_values_beyond_float16(single: Path) -> None:
    file = single / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model.norm.weight holds values that float16 cannot, or NaN: use --dtype"):
        load(single, "float16")
