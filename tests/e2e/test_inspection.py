"""`pdmesh model inspect` says what a worker then takes: a real one, whose cache and buffers requests have filled."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers

from tests.processes import ProcessMesh
from tests.tiny_models import write_tokenizer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is counted so on Linux"),
]

_MAX_ERROR = 0.05
_NUM_BLOCKS = 250
_BLOCK_SIZE = 16
# As the engine's default has it: so many rows of logits are in use at once.
_MAX_NUM_SEQS = 64

_COMMON: dict[str, Any] = {"vocab_size": 16000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_GPT2: dict[str, Any] = {**_COMMON, "n_embd": 768, "n_layer": 8, "n_head": 12, "n_positions": 1024}
_MIXTRAL: dict[str, Any] = {
    **_LLAMA,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 512,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def make_model(family: str, fields: dict[str, Any], directory: Path) -> Path:
    config: Any = getattr(transformers, f"{family}Config")(**fields)
    name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model: Any = getattr(transformers, name)(config)
    model.to(torch.bfloat16).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def inspect(model: Path, *flags: str) -> dict[str, Any]:
    command = (sys.executable, "-m", "pdmesh.cli.main", "model", "inspect", str(model), "--json", *flags)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


async def measured_bytes(model: Path, run_dir: Path, flags: tuple[str, ...], max_model_len: int) -> int:
    """Resident memory of a worker, once each block was written and each buffer used."""
    async with ProcessMesh(model, run_dir, num_prefill=0, num_decode=1, decode_flags=flags) as mesh:
        (decode,) = mesh.decodes

        async def complete(seed: int, num_tokens: int) -> None:
            tokens = [3 + (seed * 7919 + index * (seed + 1)) % 15000 for index in range(num_tokens)]
            temperature = float(seed % 2)
            await mesh.client.generate(tokens=tokens, max_tokens=8, temperature=temperature, ignore_eos=True)

        length = min(max_model_len, _NUM_BLOCKS * _BLOCK_SIZE) - 8
        for seed in range(-(-_NUM_BLOCKS * _BLOCK_SIZE // length)):
            await complete(seed, length)
        await asyncio.gather(*(complete(100 + seed, 20) for seed in range(_MAX_NUM_SEQS)))
        assert decode.pid is not None
        return int(psutil.Process(decode.pid).memory_info().rss)


@pytest.mark.parametrize(
    ("family", "fields", "dtype", "flags"),
    [
        pytest.param("Llama", _LLAMA, "float32", (), id="llama"),
        pytest.param("GPT2", _GPT2, "float32", (), id="gpt2", marks=pytest.mark.slow),
        pytest.param("Mixtral", _MIXTRAL, "bfloat16", (), id="mixtral", marks=pytest.mark.slow),
        pytest.param("Llama", _LLAMA, "bfloat16", ("--kernels", "torch"), id="torch", marks=pytest.mark.slow),
        pytest.param("Llama", _LLAMA, "float32", ("--kv-cache-dtype", "int8"), id="kv-int8", marks=pytest.mark.slow),
        pytest.param("Llama", _LLAMA, "bfloat16", ("--quantization", "int8"), id="int8", marks=pytest.mark.slow),
    ],
)
async def test_a_worker_takes_what_was_said(
    tmp_path: Path, family: str, fields: dict[str, Any], dtype: str, flags: tuple[str, ...]
) -> None:
    model = make_model(family, fields, tmp_path / "model")
    flags = ("--dtype", dtype, "--num-blocks", str(_NUM_BLOCKS), *flags)
    report = inspect(model, *flags)
    assert report["verdict"]["num_blocks"] == _NUM_BLOCKS
    (room,) = report["serving"]["rooms"]
    measured = await measured_bytes(model, tmp_path, flags, report["verdict"]["max_model_len"])
    said = room["needed"]
    # What a model adds is to be exact, not only what every process takes.
    assert said - room["processes"] > 100e6
    assert abs(said - measured) <= _MAX_ERROR * measured, f"said {said / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB"
    print(f"\n{family}: said {said / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
