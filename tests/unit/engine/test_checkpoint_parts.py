"""Parts of stored tensors: bit for bit those of the whole, at the price of the part."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Encoding
from safetensors.torch import save_file

from bench.engine.checkpoints import hf_config
from bench.engine.random_llama import TINY
from engine.weights.checkpoint import WHOLE, Checkpoint, Part, part_bytes
from engine.weights.source import open_checkpoint

MIB = 2**20
# Of safetensors and of GGUF.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ENCODINGS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"]

HEADS, HEAD_DIM, WIDTH = 8, 256, 512
MATRIX = "model.layers.0.mlp.down_proj.weight"
VECTOR = "model.norm.weight"
Q_WEIGHT = "model.layers.0.self_attn.q_proj.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
K_WEIGHT = "model.layers.0.self_attn.k_proj.weight"
# Several pieces of both formats; rows that no block of values divides.
SHAPES = {MATRIX: (1201, WIDTH), VECTOR: (WIDTH,)}
CONFIG = replace(TINY, hidden_size=WIDTH, num_heads=HEADS, num_kv_heads=HEADS // 2, head_dim=HEAD_DIM, num_layers=1)

PARTS = [
    WHOLE,
    Part(rows=range(1)),
    Part(rows=range(3, 1200)),
    Part(columns=range(256)),
    Part(columns=range(256, 512)),
    Part(columns=range(100, 331)),
    Part(rows=range(600, 1201), columns=range(31, 33)),
    Part(rows=range(7, 8), columns=range(511, 512)),
    Part(rows=range(5, 5)),
    Part(columns=range(9, 9)),
]
# What only safetensors hold so: heads' rows apart from each other, and matrices with inputs before outputs.
LAID_OUT = [
    Part(rows=(range(3, 5), range(700, 1201), range(0, 1))),
    Part(rows=(range(9, 11), range(30, 31)), columns=range(100, 331)),
    Part(transposed=True),
    Part(rows=range(500, 512), columns=range(7, 1190), transposed=True),
    Part(rows=(range(30, 41), range(3, 4)), transposed=True),
]


def write_safetensors(directory: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf_config(CONFIG, "bfloat16")))
    return open_checkpoint(str(directory))


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, Encoding]]) -> Checkpoint:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, WIDTH), np.float32))
    for name, (stored, encoding) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(str(path))


def encoded(shape: tuple[int, ...], encoding: Encoding) -> np.ndarray:
    """Random bytes, which are blocks of any encoding; without the bit that could make a scale infinite."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[encoding]
    stored = np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] // per_block * block_bytes), np.uint8)
    plain = {Encoding.F32: np.float32, Encoding.F16: np.float16}
    return (stored & 0xBF).view(plain.get(encoding, np.uint8))


def of_whole(whole: torch.Tensor, part: Part) -> torch.Tensor:
    whole = whole.t() if part.transposed else whole
    if part.rows is not None:
        runs = part.rows if isinstance(part.rows, tuple) else (part.rows,)
        whole = torch.cat([whole[run.start : run.stop] for run in runs])
    return whole if part.columns is None else whole[:, part.columns.start : part.columns.stop]


def assert_parts_are_of_whole(checkpoint: Checkpoint, name: str, whole: torch.Tensor, parts: list[Part]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for part in parts:
            values = checkpoint.read(name, dtype, part)
            assert values.dtype == dtype
            assert values.is_contiguous()
            assert values.untyped_storage().nbytes() == values.numel() * dtype.itemsize
            assert torch.equal(values, of_whole(whole, part).to(dtype)), part


KINDS = [*(("safetensors", encoding) for encoding in DTYPES), *(("gguf", encoding) for encoding in ENCODINGS)]


@pytest.fixture(params=KINDS, ids="-".join)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """A checkpoint with a matrix and a vector in one encoding, and their values as the formats' libraries read them."""
    file_format, name = request.param
    if file_format == "safetensors":
        torch.manual_seed(0)
        tensors = {tensor: torch.randn(shape).to(DTYPES[name]) for tensor, shape in SHAPES.items()}
        return write_safetensors(tmp_path / "hf", tensors), tensors
    encoding = Encoding[name]
    gguf_names = {MATRIX: "blk.0.ffn_down.weight", VECTOR: "output_norm.weight"}
    files = {tensor: encoded(shape, encoding) for tensor, shape in SHAPES.items()}
    checkpoint = write_gguf(tmp_path / "m.gguf", {gguf_names[tensor]: (files[tensor], encoding) for tensor in files})
    decoded = {tensor: np.array(gguf.quants.dequantize(values, encoding)) for tensor, values in files.items()}
    return checkpoint, {tensor: torch.from_numpy(values) for tensor, values in decoded.items()}


def test_every_encoding(stored: tuple[Checkpoint, dict[str, torch.Tensor]]) -> None:
    checkpoint, wholes = stored
    assert_parts_are_of_whole(checkpoint, MATRIX, wholes[MATRIX], PARTS)
    vector_parts = [WHOLE, *(Part(rows=rows) for rows in (range(256), range(17, 511), range(40, 40)))]
    assert_parts_are_of_whole(checkpoint, VECTOR, wholes[VECTOR], vector_parts)


@pytest.mark.parametrize("encoding", DTYPES)
def test_layouts_of_safetensors(tmp_path: Path, encoding: str) -> None:
    torch.manual_seed(0)
    tensors = {tensor: torch.randn(shape).to(DTYPES[encoding]) for tensor, shape in SHAPES.items()}
    checkpoint = write_safetensors(tmp_path / "hf", tensors)
    assert_parts_are_of_whole(checkpoint, MATRIX, tensors[MATRIX], LAID_OUT)
    assert_parts_are_of_whole(checkpoint, VECTOR, tensors[VECTOR], [Part(rows=(range(9, 11), range(2, 3)))])


def test_the_whole_is_its_parts_together(stored: tuple[Checkpoint, dict[str, torch.Tensor]]) -> None:
    checkpoint, _ = stored
    whole = checkpoint.read(MATRIX, torch.float32)
    cuts = [0, 1, 500, 1201]
    rows = [Part(rows=range(*cut)) for cut in itertools.pairwise(cuts)]
    columns = [Part(columns=range(first, first + 128)) for first in range(0, WIDTH, 128)]
    assert torch.equal(torch.cat([checkpoint.read(MATRIX, torch.float32, part) for part in rows]), whole)
    assert torch.equal(torch.cat([checkpoint.read(MATRIX, torch.float32, part) for part in columns], dim=1), whole)
    assert sum(part_bytes(checkpoint.tensors[MATRIX], part) for part in rows) == checkpoint.tensors[MATRIX].num_bytes


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_heads_of_permuted_rows(tmp_path: Path, encoding: str) -> None:
    shapes = {
        Q_WEIGHT: (HEADS * HEAD_DIM, WIDTH),
        Q_BIAS: (HEADS * HEAD_DIM,),
        K_WEIGHT: (HEADS * HEAD_DIM // 2, WIDTH),
    }
    kinds = {name: Encoding[encoding] if len(shape) > 1 else Encoding.F32 for name, shape in shapes.items()}
    files = {name: encoded(shape, kinds[name]) for name, shape in shapes.items()}
    gguf_names = {Q_WEIGHT: "blk.0.attn_q.weight", Q_BIAS: "blk.0.attn_q.bias", K_WEIGHT: "blk.0.attn_k.weight"}
    checkpoint = write_gguf(tmp_path / "m.gguf", {gguf_names[name]: (files[name], kinds[name]) for name in files})
    for name, values in files.items():
        permuted = torch.from_numpy(np.array(gguf.quants.dequantize(values, kinds[name])))
        # Of a head, rows 0, 2, 4, … and then 1, 3, 5, …
        in_head = [*range(0, HEAD_DIM, 2), *range(1, HEAD_DIM, 2)]
        whole = permuted[[first + row for first in range(0, shapes[name][0], HEAD_DIM) for row in in_head]]
        rows = [None, range(HEAD_DIM), range(HEAD_DIM, 4 * HEAD_DIM), range(3 * HEAD_DIM, 4 * HEAD_DIM)]
        assert_parts_are_of_whole(checkpoint, name, whole, [Part(rows=some) for some in rows])
        if permuted.dim() > 1:
            assert_parts_are_of_whole(checkpoint, name, whole, [Part(columns=range(3, 400))])
        with pytest.raises(AssertionError, match="cut through a head"):
            checkpoint.read(name, torch.float32, Part(rows=range(HEAD_DIM // 2)))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (MATRIX, Part(rows=range(1200, 1202))),
        (MATRIX, Part(rows=range(-1, 1))),
        (MATRIX, Part(columns=range(500, 513))),
        (MATRIX, Part(columns=range(0, 500, 2))),
        (VECTOR, Part(rows=range(513))),
        (VECTOR, Part(columns=range(1))),
    ],
)
def test_a_range_outside_is_a_defect(tmp_path: Path, name: str, part: Part) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    checkpoint = write_safetensors(tmp_path / "hf", tensors)
    with pytest.raises(AssertionError):
        checkpoint.read(name, torch.float32, part)
    with pytest.raises(AssertionError):
        part_bytes(checkpoint.tensors[name], part)


def test_bytes_of_a_part(tmp_path: Path) -> None:
    encoding = Encoding.Q4_0
    checkpoint = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": (encoded((10, WIDTH), encoding), encoding)})
    tensor = checkpoint.tensors[MATRIX]
    assert part_bytes(tensor, WHOLE) == tensor.num_bytes == 10 * WIDTH // 32 * 18
    assert part_bytes(tensor, Part(rows=range(3))) == 3 * WIDTH // 32 * 18
    assert part_bytes(tensor, Part(rows=range(3), columns=range(64))) == 3 * 2 * 18
    assert part_bytes(tensor, Part(rows=range(1), columns=range(1))) == 0
    assert part_bytes(tensor, Part(columns=range(0))) == 0


# Prints by how many bytes the peak of this process' memory rises while it reads columns, and while it reads rows.
MEASURE = """
import sys, torch
from pathlib import Path
from engine.weights.checkpoint import Part
from engine.weights.source import open_checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

_, source, name = sys.argv
checkpoint = open_checkpoint(source)
checkpoint.read(name, torch.bfloat16, Part(rows=range(512)))  # libraries take memory at their first use
for part in (Part(columns=range(512)), Part(rows=range(2048))):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    values = checkpoint.read(name, torch.bfloat16, part)
    print(peak() - before)
    del values
"""


def ones_in_safetensors(tmp_path: Path) -> Checkpoint:
    return write_safetensors(tmp_path / "hf", {MATRIX: torch.ones(16384, 4096, dtype=torch.bfloat16)})


def ones_in_gguf(tmp_path: Path) -> Checkpoint:
    ones = (np.ones((16384, 4096), np.float16), Encoding.F16)
    return write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": ones})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("write", [ones_in_safetensors, ones_in_gguf])
def test_a_part_takes_memory_for_the_part(tmp_path: Path, write: Callable[[Path], Checkpoint]) -> None:
    file = write(tmp_path).files[0]
    assert file.stat().st_size > 128 * MIB
    source = str(file if file.suffix == ".gguf" else file.parent)
    command = [sys.executable, "-c", MEASURE, source, MATRIX]
    rises = [int(line) for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]
    # Each an eighth of the matrix, 16 MiB.
    assert len(rises) == 2
    assert all(14 * MIB < rise < 40 * MIB for rise in rises), rises
