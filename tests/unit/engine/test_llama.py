"""The model over its paged cache gives the logits of transformers, whatever way a text is cut into steps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.batch import Batch
from engine.executor import TorchExecutor
from engine.kv_cache import KVCache
from engine.loader import LoadedModel, load_model
from engine.models.llama import RMSNorm

CPU = torch.device("cpu")
SHAPES = ["gqa", "mha", "mqa-tied", "wide-heads", "biases", "rope-linear", "rope-llama3", "rope-yarn"]


def _nothing(done: int, total: int) -> None:
    pass


class Texts:
    """Texts computed side by side in one cache, whose blocks are scattered and begin as NaN."""

    def __init__(self, loaded: LoadedModel, texts: Sequence[Sequence[int]], block_size: int = 4) -> None:
        self.loaded = loaded
        self.texts = [list(text) for text in texts]
        self.num_computed = [0] * len(texts)
        self.logits: list[list[torch.Tensor]] = [[] for _ in texts]
        blocks_each = -(-max(map(len, texts)) // block_size)
        # Block 0 belongs to no text: with it tables are padded.
        order = torch.randperm(len(texts) * blocks_each, generator=torch.Generator().manual_seed(1)) + 1
        self.tables = order.view(len(texts), blocks_each)
        dtype = next(loaded.model.parameters()).dtype
        num_blocks = len(order) + 1
        self.cache = KVCache(loaded.config, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=CPU)
        self.cache.data.fill_(torch.nan)
        self.executor = TorchExecutor(loaded.model, self.cache)

    def step(self, num_tokens: dict[int, int]) -> None:
        """Computes the next tokens, as many as said, of each text named, in the order named."""
        block_size = self.cache.block_size
        input_ids: list[int] = []
        positions: list[torch.Tensor] = []
        slots: list[torch.Tensor] = []
        seq_lens = []
        for text, count in num_tokens.items():
            begin, end = self.num_computed[text], self.num_computed[text] + count
            assert end <= len(self.texts[text])
            input_ids += self.texts[text][begin:end]
            positions.append(torch.arange(begin, end))
            slots.append(self.tables[text][positions[-1] // block_size] * block_size + positions[-1] % block_size)
            seq_lens.append(end)
        tables = self.tables[list(num_tokens)].clone()
        for row, seq_len in enumerate(seq_lens):
            tables[row, -(-seq_len // block_size) :] = 0
        batch = Batch(
            input_ids=torch.tensor(input_ids),
            positions=torch.cat(positions),
            slot_mapping=torch.cat(slots),
            query_lens=np.array(list(num_tokens.values())),
            seq_lens=np.array(seq_lens),
            block_tables=tables[:, : -(-max(seq_lens) // block_size)],
            logits_rows=torch.arange(len(input_ids)),
        )
        hidden = self.executor.forward(batch)
        logits = self.executor.logits(hidden[batch.logits_rows])
        for text, part in zip(num_tokens, torch.split(logits, list(num_tokens.values())), strict=True):
            self.num_computed[text] += len(part)
            self.logits[text].append(part)

    def logits_of(self, text: int) -> torch.Tensor:
        """[tokens, vocab]"""
        assert self.num_computed[text] == len(self.texts[text])
        return torch.cat(self.logits[text])


def random_text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference_logits(directory: Path, text: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        model = LlamaForCausalLM.from_pretrained(directory)
        logits: torch.Tensor = model(torch.tensor([text])).logits[0]
    return logits


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3 * float(expected.std()))
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 150])
def test_chunked_prefill_equals_transformers(tiny_llama: Callable[[str], Path], shape: str, chunk: int) -> None:
    directory = tiny_llama(shape)
    text = random_text(150)
    texts = Texts(load_model(str(directory), "float32", CPU, _nothing), [text])
    for begin in range(0, len(text), chunk):
        texts.step({0: min(chunk, len(text) - begin)})
    assert_same_logits(texts.logits_of(0), reference_logits(directory, text))


@pytest.mark.parametrize("shape", ["gqa", "mha", "mqa-tied"])
def test_sequences_at_different_stages_share_steps(tiny_llama: Callable[[str], Path], shape: str) -> None:
    directory = tiny_llama(shape)
    lengths = [40, 230, 3, 61, 17, 18, 1]
    texts = Texts(
        load_model(str(directory), "float32", CPU, _nothing),
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


def test_many_decodes_equal_each_alone(tiny_llama: Callable[[str], Path]) -> None:
    loaded = load_model(str(tiny_llama("gqa")), "float32", CPU, _nothing)
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
    texts = Texts(load_model(str(directory), dtype, CPU, _nothing), [text])
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
    texts = Texts(load_model(str(directory), "float32", CPU, _nothing), [[0] * len(expected)])
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
    texts = Texts(load_model(str(directory), "float32", CPU, _nothing), [first, second])
    texts.step({0: len(first)})
    texts.tables[1, :6] = texts.tables[0, :6]
    texts.num_computed[1] = 24
    texts.step({1: len(second) - 24})
    assert_same_logits(torch.cat(texts.logits[1]), reference_logits(directory, second)[24:])
