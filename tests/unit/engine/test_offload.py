"""Weights that wait on disk: the same logits, in less memory."""

import json
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.backend import cpu_kernels, kv_layout, place_model
from engine.config import EngineConfig
from engine.cpu.executor import CpuExecutor
from engine.cpu.library import Kernels
from engine.cpu.pages_ahead import PagesAhead
from engine.executor import ModelExecutor, TorchExecutor
from engine.kv_cache import KVCache
from engine.loader import LoadedModel, weights_size
from engine.models import build_model
from engine.placement import AHEAD, DeviceMapError, Placement, place_weights
from engine.weights.offload_file import FileMemory, OffloadFile, address_of
from engine.weights.quantized import UNQUANTIZED
from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError
from tests.texts import CPU, Texts, load, random_text


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of more layers than are in memory at once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2 * AHEAD + 4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("models") / "deep"
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def logits(config: EngineConfig, steps: Sequence[int]) -> torch.Tensor:
    """Of a text in steps of so many tokens."""
    directory = Path(config.model)
    loaded = load(directory, config.dtype_name, stored=True)
    kernels = cpu_kernels(config, CPU)
    packed = place_model(config, loaded, kernels, CPU, UNQUANTIZED)
    assert not loaded.stored, "all was read"

    def make_executor(loaded: LoadedModel, kv_cache: KVCache) -> ModelExecutor:
        if packed is None:
            return TorchExecutor(loaded.model, kv_cache)
        assert kernels is not None
        return CpuExecutor(
            Kernels(kernels, loaded.dtype), loaded, packed, kv_cache, max_tokens=512, max_position=256, num_threads=2
        )

    layout = kv_layout(config, loaded.config, loaded.dtype)
    texts = Texts(loaded, [random_text(sum(steps))], block_size=16, layout=layout, make_executor=make_executor)
    for count in steps:
        texts.step({0: count})
    return texts.logits_of(0)


def limit(directory: Path, share: float, dtype: torch.dtype = torch.float32) -> str:
    """Of the model's bytes."""
    parameters = build_model(open_checkpoint(str(directory)).config).parameters()
    return f"cpu={int(share * sum(parameter.numel() for parameter in parameters) * dtype.itemsize)}"


@pytest.mark.parametrize(("kernels", "weights"), [("auto", "packed"), ("auto", "mapped"), ("torch", "auto")])
@pytest.mark.parametrize("device_map", ["auto", "sequential"])
def test_off_loaded_weights_give_the_same_logits(
    deep: Path, tmp_path: Path, kernels: str, weights: str, device_map: str
) -> None:
    steps = (20, 1, 7, 1, 1)
    whole = EngineConfig(model=str(deep), device="cpu", kernels=kernels, weights=weights, device_map=device_map)
    limited = replace(whole, max_memory=limit(deep, 0.7), offload_dir=str(tmp_path))
    assert placement(limited).waiting
    assert torch.equal(logits(limited, steps), logits(whole, steps))
    assert not list(tmp_path.iterdir()), "the file has no name, and is gone with the process"


def test_a_file_says_what_waits(deep: Path, tmp_path: Path) -> None:
    layers = {f"model.layers.{layer}": "disk" for layer in range(AHEAD + 2)}
    (tmp_path / "map.json").write_text(json.dumps({"": "cpu", "lm_head": "disk", **layers}))
    whole = EngineConfig(model=str(deep), device="cpu")
    mapped = replace(whole, device_map=str(tmp_path / "map.json"), offload_dir=str(tmp_path))
    assert placement(mapped).waiting == {**layers, "lm_head": "disk"}
    assert torch.equal(logits(mapped, (5, 1)), logits(whole, (5, 1)))


def placement(config: EngineConfig) -> Placement:
    model = build_model(open_checkpoint(config.model).config)
    return place_weights(model, config, CPU, torch.float32, None, output_waits=True)


def refusal(
    directory: Path, *, max_memory: str | None = None, device_map: str | None = None, offload_dir: Path | None = None
) -> str:
    config = EngineConfig(
        model=str(directory), device="cpu", max_memory=max_memory, device_map=device_map,
        offload_dir=None if offload_dir is None else str(offload_dir),
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        placement(config)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_layers_that_wait_lie_between_those_that_do_not(deep: Path, tmp_path: Path) -> None:
    limited = EngineConfig(model=str(deep), device="cpu", max_memory=limit(deep, 0.95), offload_dir=str(tmp_path))
    placed = placement(limited)
    waiting = sorted(int(re.findall(r"\d+", name)[0]) for name in placed.waiting if "layers" in name)
    assert 1 < len(waiting) < 2 * AHEAD + 4
    assert min(after - before for before, after in pairwise(waiting)) > 1


def test_of_what_comes_in_no_more_is_counted_than_is_there_at_once(deep: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"": "cpu", "model.layers": "disk", "lm_head": "disk"}')
    mapped = EngineConfig(
        model=str(deep), device="cpu", device_map=str(tmp_path / "map.json"), offload_dir=str(tmp_path)
    )
    model = build_model(open_checkpoint(str(deep)).config)
    layer, output = (
        weights_size(model.get_submodule(name), torch.float32, None) for name in ("model.layers.0", "lm_head")
    )
    # The output is once among those that are there; plain torch has as many buffers, each for the largest layer.
    assert placement(mapped).staged_bytes == AHEAD * layer + max(layer, output)
    (tmp_path / "map.json").write_text('{"": "cpu", "model.layers.1": "disk"}')
    assert placement(mapped).staged_bytes == layer
    in_torch = place_weights(model, mapped, CPU, torch.float32, None, output_waits=False)
    assert in_torch.staged_bytes == (AHEAD + 1) * layer
    (tmp_path / "map.json").write_text('{"": "cpu", "lm_head": "disk"}')
    with pytest.raises(DeviceMapError, match=r"'lm_head' cannot wait on disk: whole layers can; leave it on cpu$"):
        place_weights(model, mapped, CPU, torch.float32, None, output_waits=False)


def test_what_does_not_fit_is_refused_with_numbers(deep: Path, tmp_path: Path) -> None:
    assert re.search(
        r"^weights would take .* GiB on cpu and may take .* GiB there: raise --max-memory",
        refusal(deep, max_memory=limit(deep, 0.1), offload_dir=tmp_path),
    )
    assert re.search("on disk: name a directory with --offload-dir", refusal(deep, max_memory=limit(deep, 0.7)))
    small_disk = limit(deep, 0.7) + ",disk=1000"
    assert re.search("GiB on disk and may take", refusal(deep, max_memory=small_disk, offload_dir=tmp_path))
    assert refusal(deep, max_memory="cuda:3=1GiB") == "--max-memory names cuda:3: here are cpu, disk"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not readable as JSON"),
        ("[]", "must map module names to devices"),
        ('{"model.layers.99": "disk"}', "'model.layers.99' is no module"),
        ('{"model.layers.0": "attic"}', "'model.layers.0' is to lie on 'attic'"),
        ('{"model.embed_tokens": "disk"}', "'model.embed_tokens' cannot wait on disk"),
        ('{"model.layers.0.mlp": "disk"}', "'model.layers.0.mlp' cannot wait on disk"),
    ],
)
def test_maps_that_make_no_sense(deep: Path, tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(content)
    message = refusal(deep, device_map=str(path), offload_dir=tmp_path)
    assert message.startswith(f"{path}: {expected}")


@pytest.mark.parametrize("text", ["8GiB", "cpu=", "cpu=8 elephants", "gpu=1GiB"])
def test_limits_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--max-memory is {text}: must be places and sizes"):
        EngineConfig(model="any", max_memory=text)


def test_at_most_a_few_units_are_in_memory(tmp_path: Path) -> None:
    size, num_units = 64 * mmap.PAGESIZE, AHEAD + 5
    file = OffloadFile(tmp_path, num_units * size)
    memories = []
    for unit in range(num_units):
        memory = FileMemory(file)
        np.frombuffer(memory.take(size), np.uint8)[:] = unit
        memory.store()
        memories.append(memory)
    pages = PagesAhead([memory.pieces for memory in memories])
    for unit in [*range(num_units), 0, 1, 5, 2, 2, num_units - 1, 0]:
        pages.enter(unit)
        resident = [resident_bytes(memory.pieces[0]) for memory in memories]
        assert resident[unit] == size, "it was there before it was read"
        assert sum(resident) <= (AHEAD + 2) * size, "one may still be leaving while the next comes"
        assert (np.frombuffer(memories[unit].pieces[0], np.uint8) == unit).all()


def resident_bytes(memory: memoryview) -> int:
    """What of a mapping counts as this process's memory."""
    begin = address_of(memory)
    with open("/proc/self/smaps") as smaps:
        inside = False
        total = 0
        for line in smaps:
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = begin <= int(match[1], 16) < begin + len(memory)
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{tmp_path}: weights of .* GiB are to wait there, and .* GiB are free"):
        OffloadFile(tmp_path, 1 << 60)
    with pytest.raises(ConfigError, match=r"No such file or directory.*--offload-dir"):
        OffloadFile(tmp_path / "nowhere", 1)
    assert os.listdir(tmp_path) == []
