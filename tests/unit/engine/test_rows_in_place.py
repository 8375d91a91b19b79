"""Matrices that the kernels read where they lie: products, bits, and files that are broken or written to."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.api import EngineRequest
from engine.assembly import assemble
from engine.config import EngineConfig
from engine.cpu.build import BuildError, kernels_path, this_target
from engine.cpu.library import Decoder, Finish, Format, Kernels, Step
from engine.cpu.packing import PACK, PackedMatrix, padded
from engine.cpu.program import Program
from engine.loader import load_model
from engine.local_engine import LocalEngine
from engine.request import Request
from engine.weights.weight_file import WeightFile, WeightsChangedError
from pdmesh import host_memory
from pdmesh.errors import ConfigError, UnavailableError
from pdmesh.sampling import SamplingParams
from tests.texts import load, packed_for

try:
    KERNELS = {dtype: Kernels(kernels_path(this_target()), dtype) for dtype in PACK}
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)
DTYPES = pytest.mark.parametrize("dtype", PACK)
MAX_ROWS = 40


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lying(weight: torch.Tensor, bias: torch.Tensor) -> PackedMatrix:
    """By the addresses of the rows of `weight`, which must live as long; those of zeros fill up the last panel."""
    n, k = weight.shape
    table = torch.zeros(padded(n) + -(-weight.itemsize * k // 8), dtype=torch.int64)
    table[:n] = weight.data_ptr() + torch.arange(n) * weight.stride(0) * weight.itemsize
    table[n : padded(n)] = table[padded(n) :].data_ptr()
    return PackedMatrix(n, k, table, torch.cat([bias, torch.zeros(padded(n) - n)]), Format.ROWS)


def product(rows: torch.Tensor, matrix: PackedMatrix, num_threads: int = 2) -> torch.Tensor:
    """[num_rows, padded n], float32."""
    program = Program(MAX_ROWS, rows.dtype)
    source, output = program.rows(matrix.k), program.rows(matrix.n, torch.float32)
    # What lies behind a row is not a part of it.
    source.values.fill_(float("nan"))
    source.values[: len(rows), : matrix.k] = rows
    program.project(source, matrix, output, Finish.STORE)
    positions = torch.arange(len(rows))
    step = Step(num_tokens=len(rows), token_ids=positions.data_ptr(), positions=positions.data_ptr())
    decoder = Decoder(num_kv_heads=1, num_heads=1)
    KERNELS[rows.dtype].run(decoder, step, program.compile(), num_threads)
    return output.values[: len(rows), : padded(matrix.n)].clone()


@DTYPES
@pytest.mark.parametrize(("n", "k"), [(1, 1), (32, 64), (37, 50), (64, 33), (5, 1000), (130, 257)])
def test_products(dtype: torch.dtype, n: int, k: int) -> None:
    # Rows of a wider matrix, which begin anywhere.
    weight, bias, rows = normal(n, k + 3)[:, 3:].to(dtype), normal(n, seed=1), normal(MAX_ROWS, k, seed=2).to(dtype)
    expected = rows.double() @ weight.double().T + bias
    scale = rows.double().abs() @ weight.double().abs().T + 1
    for num_rows in (1, 2, 5, 6, 7, 12, 13, MAX_ROWS):
        actual = product(rows[:num_rows], lying(weight, bias))
        assert ((actual[:, :n] - expected[:num_rows]).abs() / scale[:num_rows]).max() < 1e-6
        assert not actual[:, n:].any()


@DTYPES
def test_a_row_has_the_same_bits_whatever_lies_beside_it(dtype: torch.dtype) -> None:
    weight, rows = normal(70, 333).to(dtype), normal(MAX_ROWS, 333, seed=2).to(dtype)
    matrix = lying(weight, normal(70, seed=1))
    together = product(rows, matrix)
    for first, end in ((0, 1), (3, 5), (11, 23), (1, MAX_ROWS)):
        for num_threads in (1, 2):
            assert torch.equal(product(rows[first:end], matrix, num_threads), together[first:end])


@pytest.fixture
def single(tiny_llama: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model in one file, in float32."""
    return shutil.copytree(tiny_llama("gqa"), tmp_path / "single")


def core_config(directory: Path, weights: str, dtype: str = "float32") -> EngineConfig:
    return EngineConfig(model=str(directory), dtype=dtype, device="cpu", num_threads=2, num_blocks=40, weights=weights)


def greedy_tokens(config: EngineConfig) -> list[int]:
    core = assemble(config, load_model, lambda done, total: None).core
    request = Request(EngineRequest("r", tuple(range(3, 40)), SamplingParams(temperature=0.0, max_tokens=30)))
    core.scheduler.add(request)
    while not request.finished:
        core.step()
    return list(request.token_ids[37:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_mapped_give_the_tokens_of_packed_ones(single: Path, dtype: str) -> None:
    file = single / "model.safetensors"
    tensors = {name: values.to(getattr(torch, dtype)) for name, values in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    tokens = [greedy_tokens(core_config(single, weights, dtype)) for weights in ("mapped", "packed")]
    assert tokens[0] == tokens[1]


def test_what_does_not_lie_ready_is_packed(single: Path) -> None:
    loaded = load(single, "bfloat16", stored=True)
    packed = packed_for(loaded, KERNELS[torch.bfloat16], maps=True)
    assert {matrix.format for matrix in packed.matrices} == {Format.ELEMENT}
    assert packed.files == ()


def test_a_mapped_model_takes_no_memory_for_its_matrices(single: Path) -> None:
    loaded = load(single, stored=True)
    packed = packed_for(loaded, KERNELS[torch.float32], maps=True)
    assert {matrix.format for matrix in packed.matrices} == {Format.ROWS}
    (file,) = packed.files
    assert file.path == single / "model.safetensors"
    matrices = sum(values.nbytes for values in load_file(file.path).values() if values.dim() == 2)
    assert packed.mapped_bytes == matrices
    assert not loaded.stored


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_with_its_tensor(single: Path, value: float) -> None:
    file, name = single / "model.safetensors", "model.layers.1.self_attn.v_proj.weight"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        packed_for(load(single, stored=True), KERNELS[torch.float32], maps=True)
    assert caught.value.message == f"{file}: tensor {name} holds NaN or infinity: get the file anew"


def test_a_file_that_shrinks_before_it_is_mapped(single: Path) -> None:
    file = single / "model.safetensors"
    loaded = load(single, stored=True)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ConfigError, match=rf"^{file}: ends within tensor .*: get the file anew"):
        packed_for(loaded, KERNELS[torch.float32], maps=True)


def write_to(path: Path) -> None:
    """Its first byte, as it was."""
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(first)


def test_who_writes_to_a_file_is_noticed_and_who_replaces_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 5000)
    opened = WeightFile(path)
    (tmp_path / "new").write_bytes(b"b" * 5000)
    (tmp_path / "new").rename(path)
    opened.check_unchanged()
    assert bytes(opened.mapped()) == b"a" * 5000
    other = WeightFile(path)
    write_to(path)
    with pytest.raises(WeightsChangedError, match=rf"^{path}: was written to while a model computes with it: start"):
        other.check_unchanged()
    opened.check_unchanged()


_CUT_SHORT = """
import os, sys
from engine.assembly import assemble
from engine.config import EngineConfig
from engine.loader import load_model
from engine.api import EngineRequest
from engine.request import Request
from pdmesh.sampling import SamplingParams

config = EngineConfig(model=sys.argv[1], dtype="float32", device="cpu", num_threads=1, num_blocks=9, weights="mapped")
core = assemble(config, load_model, lambda done, total: None).core
os.truncate(os.path.join(sys.argv[1], "model.safetensors"), 10_000)
core.scheduler.add(Request(EngineRequest("r", (1, 2, 3), SamplingParams())))
print(core.step())
"""


def test_a_file_that_is_cut_short_ends_the_process_without_an_answer(single: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _CUT_SHORT, str(single)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "")


def test_pages_of_mapped_weights_are_not_free_for_the_kv_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_machine_free_bytes", lambda meminfo: 10 << 30)
    for of_container, mapped, free in ((1 << 62, 4, 6), (1 << 62, 11, 0), (5 << 30, 4, 5)):
        monkeypatch.setattr(host_memory, "_cgroup_free_bytes", lambda cgroup, free=of_container: free)
        assert host_memory.available_host_bytes(mapped << 30) == free << 30


async def test_an_engine_whose_weights_are_written_to_ends_before_it_says_a_wrong_token(single: Path) -> None:
    engine = LocalEngine(core_config(single, "mapped"))
    await engine.start(lambda done, total: None)
    sampling = SamplingParams(temperature=0.0, max_tokens=10_000, ignore_eos=True)

    async def write_meanwhile() -> None:
        async with aclosing(engine.generate(EngineRequest("r", (1, 2, 3), sampling))) as outputs:
            async for _ in outputs:
                write_to(single / "model.safetensors")

    try:
        with pytest.raises(UnavailableError, match="was written to while a model computes with it"):
            await write_meanwhile()
        ended = await asyncio.wait_for(engine.wait_ended(), 10)
        assert isinstance(ended, WeightsChangedError)
        assert ended.peer_is_gone, "the router goes on elsewhere at once"
    finally:
        await engine.close()
