"""The model over its paged cache gives the logits of transformers, whatever way a text is cut into steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.kv_cache import PLAIN, KVLayout
from engine.models.norms import RMSNorm
from tests.texts import Texts, assert_same_logits, load, random_text, reference_logits

SHAPES = ["gqa", "mha", "mqa-tied", "wide-heads", "biases", "rope-linear", "rope-llama3", "rope-yarn"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 150])
def test_chunked_prefill_equals_transformers(tiny_llama: Callable[[str], Path], shape: str, chunk: int) -> None:
    directory = tiny_llama(shape)
    text = random_text(150)
    texts = Texts(load(directory), [text])
    for begin in range(0, len(text), chunk):
        texts.step({0: min(chunk, len(text) - begin)})
    assert_same_logits(texts.logits_of(0), reference_logits(directory, text))


@pytest.mark.parametrize("shape", ["gqa", "mha", "mqa-tied"])
def test_sequences_at_different_stages_share_steps(tiny_llama: Callable[[str], Path], shape: str) -> None:
    directory = tiny_llama(shape)
    lengths = [40, 230, 3, 61, 17, 18, 1]
    texts = Texts(
        load(directory),
        [random_text(length, seed) for seed, length in enumerate(lengths)],
    )
    # Prompts whole and in parts; decodes that group (4, 5), decodes far apart in length (1, 2); a text of one token.
    texts.step({1: 200, 4: 10})
    texts.step({5: 11, 1: 25, 0: 30, 4: 1})
    texts.step({4: 1, 5: 1, 1: 1, 2: 1, 3: 30})
    texts.step({3: 30, 2: 1, 5: 1, 6: 1, 1: 1, 4: 1, 0: 1})
    texts.step({text: length - texts.num_computed[text] for text, length in enumerate(lengths) if text != 6})
    for text, tokens in enumerate(texts.texts):
        assert_same_logits(texts.logits_of(text), reference_logits(directory, tokens))


@pytest.mark.parametrize("layout", [PLAIN, KVLayout(2)], ids=lambda layout: layout.name)
def test_a_region_of_blocks_gives_the_same_bits(tiny_llama: Callable[[str], Path], layout: KVLayout) -> None:
    loaded = load(tiny_llama("gqa"), "bfloat16")
    tokens = [random_text(60), random_text(20, seed=1)]
    whole, region = (Texts(loaded, tokens, layout=layout, region=region) for region in (False, True))
    for texts in (whole, region):
        texts.step({0: 40})
        texts.step({1: 20, 0: 19})
        texts.step({0: 1})
    for text in range(2):
        assert torch.equal(region.logits_of(text), whole.logits_of(text))


def test_many_decodes_equal_each_alone(tiny_llama: Callable[[str], Path]) -> None:
    loaded = load(tiny_llama("gqa"))
    lengths = [5 + 7 * index for index in range(32)]
    tokens = [random_text(length, seed) for seed, length in enumerate(lengths)]
    together = Texts(loaded, tokens)
    together.step({text: length - 3 for text, length in enumerate(lengths)})
    for _ in range(3):
        together.step(dict.fromkeys(reversed(range(len(lengths))), 1))
    for text in range(0, len(lengths), 5):
        alone = Texts(loaded, [tokens[text]])
        alone.step({0: lengths[text]})
        assert_same_logits(together.logits_of(text), alone.logits_of(0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_single(tiny_llama: Callable[[str], Path], dtype: str) -> None:
    directory = tiny_llama("gqa")
    text = random_text(60)
    texts = Texts(load(directory, dtype), [text])
    texts.step({0: 50})
    for _ in range(10):
        texts.step({0: 1})
    actual, expected = texts.logits_of(0), reference_logits(directory, text)
    assert actual.dtype == torch.float32
    error = (actual - expected).norm() / expected.norm()
    assert error < (0.1 if dtype == "bfloat16" else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    ours, theirs = RMSNorm(64, 1e-5), LlamaRMSNorm(64, 1e-5)
    weight = torch.nn.Parameter(torch.randn(64).to(dtype), requires_grad=False)
    ours.weight = theirs.weight = weight
    hidden = (torch.randn(50, 64) * 30).to(dtype)
    assert torch.equal(ours(hidden), theirs(hidden))


def test_greedy_tokens_equal_generate(tiny_llama: Callable[[str], Path]) -> None:
    directory = tiny_llama("mqa-tied")
    prompt = random_text(21)
    with torch.inference_mode():
        expected = LlamaForCausalLM.from_pretrained(directory).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0]
    texts = Texts(load(directory), [[0] * len(expected)])
    texts.texts[0][: len(prompt)] = prompt
    texts.step({0: len(prompt)})
    for index in range(len(prompt), len(expected)):
        texts.texts[0][index] = int(texts.logits[0][-1][-1].argmax())
        if index + 1 < len(expected):
            texts.step({0: 1})
    assert texts.texts[0] == expected.tolist()


def test_blocks_may_be_shared(tiny_llama: Callable[[str], Path]) -> None:
    """A text that begins as another goes on from that one's blocks: prefix reuse."""
    directory = tiny_llama("gqa")
    first = random_text(30)
    second = first[:24] + random_text(9, seed=5)
    texts = Texts(load(directory), [first, second])
    texts.step({0: len(first)})
    texts.tables[1, :6] = texts.tables[0, :6]
    texts.num_computed[1] = 24
    texts.step({1: len(second) - 24})
    assert_same_logits(torch.cat(texts.logits[1]), reference_logits(directory, second)[24:])
