"""Hugging Face directories, whole and damaged."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from engine.loader import LoadedModel, load_model
from engine.weights.digest import model_digest
from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError

INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(directory: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(str(directory), dtype, torch.device("cpu"), lambda done, total: None)


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture
def single(tiny_llama: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model in one file, to damage."""
    return shutil.copytree(tiny_llama("gqa"), tmp_path / "single")


@pytest.fixture
def sharded(tiny_llama: Callable[[str], Path], tmp_path: Path) -> Path:
    """The same model in several files, to damage."""
    LlamaForCausalLM.from_pretrained(tiny_llama("gqa")).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def assert_same_weights(loaded: LoadedModel, directory: Path) -> None:
    expected = dict(LlamaForCausalLM.from_pretrained(directory).named_parameters())
    actual = dict(loaded.model.named_parameters())
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("shape", ["gqa", "mqa-tied", "biases"])
def test_single_file(tiny_llama: Callable[[str], Path], shape: str) -> None:
    loaded = load(tiny_llama(shape))
    assert loaded.name == f"tiny-{shape}"
    assert_same_weights(loaded, tiny_llama(shape))


def test_shards(sharded: Path) -> None:
    assert_same_weights(load(sharded), sharded)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_weights_are_converted(single: Path, name: str, dtype: torch.dtype) -> None:
    weights = load_file(single / "model.safetensors")
    for key, parameter in load(single, name).model.named_parameters():
        assert torch.equal(parameter, weights[key].to(dtype))


def test_an_unknown_dtype_is_refused(single: Path) -> None:
    with pytest.raises(ConfigError, match=r"^dtype is 'int8': must be one of float32, bfloat16, float16$"):
        load(single, "int8")


def test_progress_reaches_the_whole(sharded: Path) -> None:
    reports: list[tuple[int, int]] = []
    load_model(str(sharded), "float32", torch.device("cpu"), lambda done, total: reports.append((done, total)))
    total = sum(tensor.numel() * 4 for file in sharded.glob("*.safetensors") for tensor in load_file(file).values())
    assert reports[0] == (0, total)
    assert reports[-1] == (total, total)
    assert reports == sorted(set(reports))


def test_the_model_outlives_its_files(single: Path) -> None:
    loaded = load(single)
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    with (single / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\xff" * size)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_what_is_of_no_use_is_not_read(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama("mqa-tied"), tmp_path / "tied")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        # Not even in a type that weights could be read from.
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(7, dtype=torch.bool)

    change_weights(directory, add)
    assert_same_weights(load(directory), tiny_llama("mqa-tied"))


def test_an_output_that_is_no_copy_counts_though_the_config_ties_it(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_llama("mqa-tied"), tmp_path / "tied")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    change_weights(directory, add)
    assert "lm_head.weight" in dict(load(directory).model.named_parameters())
    assert_same_weights(load(directory), directory)
    change_weights(directory, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(319, 64)}))
    assert "tensor lm_head.weight has shape [319, 64], and the config asks for [320, 64]" in refusal(directory)
    change_weights(directory, lambda tensors: tensors.update({"lm_head.weight": torch.full((320, 64), torch.nan)}))
    assert "tensor lm_head.weight holds NaN or infinity" in refusal(directory)


def test_a_single_file_counts_where_an_index_is_there_too(single: Path, sharded: Path) -> None:
    shutil.copy(sharded / INDEX, single)
    assert_same_weights(load(single), single)


def test_a_link_to_nothing(single: Path) -> None:
    file = single / "model.safetensors"
    file.unlink()
    file.symlink_to(single / "blob")
    assert refusal(single) == f"{file}: is a link to a file that is not there: download the model anew"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX, "model.safetensors"])
def test_a_pipe_is_not_waited_for(single: Path, name: str) -> None:
    if name == INDEX:
        (single / "model.safetensors").unlink()
    (single / name).unlink(missing_ok=True)
    os.mkfifo(single / name)
    assert refusal(single).startswith(f"{single / name}: is no regular file: ")


def test_missing_config(single: Path) -> None:
    (single / "config.json").unlink()
    assert refusal(single) == (
        f"{single}/config.json: is missing: name a Hugging Face model directory, a .gguf file or a Hub id"
    )


@pytest.mark.parametrize("content", ["{", "[1]", "\xff", "[" * 100_000])
def test_damaged_config(single: Path, content: str) -> None:
    (single / "config.json").write_bytes(content.encode("latin-1"))
    message = refusal(single)
    assert message.startswith(f"{single}/config.json: ")
    assert message.endswith("get the file anew")


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    assert (
        refusal(single) == f"{single}: neither model.safetensors nor {INDEX} is there: convert the model to safetensors"
    )


def test_missing_shard(sharded: Path) -> None:
    shard = min(sharded.glob("*.safetensors"))
    shard.unlink()
    assert refusal(sharded) == f"{shard}: is listed in {INDEX} and missing: get this shard too"


def test_index_without_map(sharded: Path) -> None:
    (sharded / INDEX).write_text("{}")
    assert refusal(sharded) == f"{sharded / INDEX}: weight_map is missing: get the file anew"


def test_index_that_names_an_absent_tensor(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    shard = index["weight_map"][Q_PROJ]
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    assert refusal(sharded) == (
        f"{sharded / INDEX}: tensor model.layers.9.mlp.up_proj.weight is listed in {shard}, which does not hold it: "
        "get the index and its shards from the same place"
    )


def test_index_that_leads_out_of_the_directory(sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {Q_PROJ: "../../secret.safetensors"}}))
    assert refusal(sharded) == (
        f"{sharded / INDEX}: tensor {Q_PROJ} lies in '../../secret.safetensors': must be a file of this directory"
    )


def test_missing_tensor(single: Path) -> None:
    change_weights(single, lambda tensors: tensors.pop(Q_PROJ))
    assert refusal(single) == (
        f"{single}/model.safetensors: tensor {Q_PROJ} is missing: get the checkpoint anew, or check its config"
    )


def test_wrong_shape(single: Path) -> None:
    change_weights(single, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 63)}))
    assert refusal(single) == (
        f"{single}/model.safetensors: tensor {Q_PROJ} has shape [64, 63], and the config asks for [64, 64]: "
        "get config and weights from the same place"
    )


def test_tensor_without_a_place(single: Path) -> None:
    change_weights(single, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    assert refusal(single).startswith(
        f"{single}/model.safetensors: tensor model.layers.0.self_attn.q_norm.weight has no place in LlamaForCausalLM"
    )


def test_unknown_encoding(single: Path) -> None:
    change_weights(single, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)}))
    assert refusal(single) == (
        f"{single}/model.safetensors: tensor {Q_PROJ} is stored as I8: supported are F64, F32, F16, BF16"
    )


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_file(single: Path, keep: int) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(single)
    assert message.startswith(f"{file}: not a whole safetensors file (")
    assert message.endswith("): get it anew")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_is_cut_short_after_it_was_opened(single: Path, dtype: torch.dtype) -> None:
    checkpoint, file = open_checkpoint(str(single)), single / "model.safetensors"
    last = list(checkpoint.tensors)[-1]
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    with pytest.raises(ConfigError) as caught:
        checkpoint.read(last, dtype)
    assert caught.value.message == (
        f"{file}: ends within tensor {last}, which it held whole a moment ago: get the file anew, and leave it alone "
        "while a model loads"
    )


def test_absurd_header_size(single: Path) -> None:
    file = single / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    assert refusal(single).startswith(f"{file}: not a whole safetensors file (")


def test_digest_is_of_content_and_not_of_place(tiny_llama: Callable[[str], Path], single: Path, sharded: Path) -> None:
    digest = load(tiny_llama("gqa")).digest
    assert digest == load(single).digest == load(single, "bfloat16").digest
    assert len(bytes.fromhex(digest)) == 32
    assert digest != load(sharded).digest
    assert digest != load(tiny_llama("mha")).digest


def test_digest_changes_with_one_weight_byte(single: Path) -> None:
    before = load(single).digest
    file = single / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100_001] ^= 1
    file.write_bytes(content)
    assert load(single).digest != before


def test_digest_changes_with_the_config(single: Path) -> None:
    before = load(single).digest
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2e-6}))
    assert load(single).digest != before


def test_digest_samples_ends_and_middle_of_large_files(single: Path) -> None:
    change_weights(single, lambda tensors: tensors.update({"model.extra": torch.zeros(3 * 2**20)}))
    checkpoint = open_checkpoint(str(single))
    file = single / "model.safetensors"
    size = file.stat().st_size
    seen = {model_digest(checkpoint)}
    for offset in (size - 1, size - 16384, size // 63 * 31):
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(b"\x01")
        seen.add(model_digest(checkpoint))
    assert len(seen) == 4
