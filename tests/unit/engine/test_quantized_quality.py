"""What a real model loses by fewer bits: SmolLM2's perplexity, and its greedy tokens beside transformers'."""

from pathlib import Path

import pytest
import torch

from bench.engine.checkpoints import prepare
from bench.precision.perplexity import TEXT, perplexity, transformers_perplexity
from engine.api import EngineRequest
from engine.assembly import assemble
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.loader import load_model
from engine.request import Request
from pdmesh.cli.model_download import is_cached, smollm2
from pdmesh.sampling import SamplingParams
from router.text.tokenizer import load_text_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not is_cached(), reason="the demo's model is not here: `make demo` gets it"),
]
NUM_TOKENS = 32


def core(dtype: str, quantization: str = "none", kv_cache_dtype: str = "auto") -> EngineCore:
    config = EngineConfig(
        model=str(smollm2()),
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        device="cpu",
        num_threads=2,
        max_model_len=2048,
        kv_cache_bytes=256 << 20,
    )
    return assemble(config, load_model, lambda done, total: None).core


@pytest.fixture(scope="module")
def directory() -> Path:
    return prepare(str(smollm2()), "float32", with_gguf=False).directory


def test_perplexity_stays_within_bounds(directory: Path) -> None:
    token_ids = load_text_model(str(smollm2())).encode(TEXT.read_text())
    exact = perplexity(core("float32"), token_ids)
    assert exact == pytest.approx(transformers_perplexity(directory, token_ids, num_threads=2), rel=1e-3)
    assert perplexity(core("bfloat16", "int8"), token_ids) == pytest.approx(exact, rel=0.01)
    assert perplexity(core("bfloat16", "int4"), token_ids) == pytest.approx(exact, rel=0.06)
    for dtype in ("float32", "bfloat16"):
        assert perplexity(core(dtype, kv_cache_dtype="int8"), token_ids) == pytest.approx(exact, rel=0.005)


def prompts() -> list[str]:
    """50, of many kinds and lengths."""
    text = TEXT.read_text()
    english = [
        text[place : place + size] for place, size in zip(range(0, 19000, 950), range(5, 2005, 100), strict=True)
    ]
    code = [
        "def fibonacci(n):\n    ",
        "#include <stdio.h>\n\nint main(",
        "SELECT name, count(*) FROM users WHERE",
        "for (let i = 0; i < 10; i++) {",
        "import numpy as np\nx = np.arange(10)\nprint(",
        "fn main() {\n    let mut total = 0;\n",
        "<html>\n<head><title>",
        '{"name": "pdmesh", "version":',
        "$ git commit -m",
        "class Stack:\n    def push(self, item):\n",
    ]
    languages = [
        "Es war einmal ein König, der hatte",
        "Il était une fois une petite fille",
        "Había una vez en un lugar de la Mancha",
        "C'era una volta un pezzo di legno",
        "Era uma vez um rei que tinha",
        "Жил-был старик со своею старухой",
        "昔々、あるところに",
        "从前有座山，山里有座庙",
        "كان يا ما كان في قديم الزمان",
        "옛날 옛적에 호랑이가",
    ]
    short = ["a", "7", "\n", "?", "é", "The", "2 + 2 =", "  ", "😀", "Once upon a time"]
    return [*english, *code, *languages, *short]


def test_greedy_tokens_of_50_prompts_are_those_of_transformers(directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    text_model, engine = load_text_model(str(smollm2())), core("float32")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    assert len(prompts()) == 50
    for number, prompt in enumerate(prompts()):
        token_ids = text_model.encode(prompt)
        request = Request(EngineRequest(f"prompt-{number}", tuple(token_ids), sampling))
        engine.scheduler.add(request)
        while not request.finished:
            engine.step()
        ours = request.token_ids[len(token_ids) :]
        # Transformers judges all of our tokens at once: each is its most likely one after those before it.
        with torch.inference_mode():
            logits = model(torch.tensor([[*token_ids, *ours]])).logits[0, len(token_ids) - 1 : -1]
        best = logits.max(dim=-1).values
        lost = best - logits[torch.arange(NUM_TOKENS), ours]
        # Of two tokens that are equally likely but for rounding, either may come first.
        assert lost.max() <= 1e-4 * best.abs().max(), f"{prompt!r}: {lost.argmax()}"
