"""Compiled layers compute what uncompiled ones do, and all of them run one program."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from engine.api import EngineRequest
from engine.compiled import compile_layers
from engine.config import EngineConfig
from engine.executor import TorchExecutor
from engine.kv_cache import KVCache
from engine.loader import LoadedModel
from engine.local_engine import LocalEngine
from pdmesh.sampling import SamplingParams
from tests.texts import Texts, assert_same_logits, load, random_text, reference_logits

pytestmark = [
    pytest.mark.slow,
    # A C++ compiler's first header takes half a minute.
    pytest.mark.timeout(600),
    # Torch's compiler uses what torch itself calls deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def compiled_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def fresh_compiler(compiled_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled before is forgotten, but for the files of this module's tests."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled_files))
    torch.compiler.reset()
    counters.clear()


def compiled(loaded: LoadedModel, kv_cache: KVCache) -> TorchExecutor:
    compile_layers(loaded.model, kv_cache)
    return TorchExecutor(loaded.model, kv_cache)


def test_any_steps_equal_transformers_and_nothing_is_compiled_again(tiny_llama: Callable[[str], Path]) -> None:
    directory = tiny_llama("gqa")
    lengths = [40, 130, 3, 61, 17]
    texts = Texts(
        load(directory), [random_text(length, seed) for seed, length in enumerate(lengths)], make_executor=compiled
    )
    num_programs = counters["stats"]["unique_graphs"]
    assert num_programs > 0
    texts.step({1: 100, 4: 10})
    texts.step({1: 1})
    texts.step({0: 30, 1: 1, 4: 1})
    texts.step({text: length - texts.num_computed[text] for text, length in enumerate(lengths)})
    for text, tokens in enumerate(texts.texts):
        assert_same_logits(texts.logits_of(text), reference_logits(directory, tokens))
    assert counters["stats"]["unique_graphs"] == num_programs


def test_layers_share_what_is_compiled(tiny_llama: Callable[[str], Path]) -> None:
    """As many programs for three layers as for one."""
    programs = []
    for num_layers in (1, 3):
        torch.compiler.reset()
        counters.clear()
        loaded = load(tiny_llama("gqa"))
        layers = loaded.model.get_submodule("model.layers")
        assert isinstance(layers, torch.nn.ModuleDict)
        assert len(layers) == 3
        for name in list(layers)[num_layers:]:
            del layers[name]
        Texts(loaded, [random_text(5)], make_executor=compiled)
        programs.append(counters["stats"]["unique_graphs"])
    assert programs[0] == programs[1] > 0


def test_half_precision_stays_near_single(tiny_llama: Callable[[str], Path]) -> None:
    directory = tiny_llama("gqa")
    text = random_text(60)
    texts = Texts(load(directory, "bfloat16"), [text], make_executor=compiled)
    texts.step({0: 50})
    for _ in range(10):
        texts.step({0: 1})
    actual, expected = texts.logits_of(0), reference_logits(directory, text)
    assert (actual - expected).norm() / expected.norm() < 0.1


async def test_an_engine_told_to_compile_does(tiny_llama: Callable[[str], Path]) -> None:
    texts = []
    for compile in (False, True):
        engine = LocalEngine(
            EngineConfig(str(tiny_llama("gqa")), device="cpu", dtype="float32", kernels="torch", compile=compile)
        )
        await engine.start(lambda done, total: None)
        try:
            request = EngineRequest("r", tuple(random_text(40)), SamplingParams(temperature=0.0, max_tokens=12))
            texts.append([token async for output in engine.generate(request) for token in output.token_ids])
        finally:
            await engine.close()
        assert (counters["stats"]["unique_graphs"] > 0) == compile
    assert texts[0] == texts[1]
