"""The CUDA executor gives the logits of transformers, whatever way a text is cut into steps.

Without a device its parts run in Triton's interpreter, on the same inputs; only the recording of graphs does not.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from engine.batch import Batch
from engine.compiled import compile_layers
from engine.executor import ModelExecutor
from engine.kv_cache import KVCache
from engine.loader import LoadedModel, load_model
from tests.texts import assert_same_logits, random_text, reference_logits
from tests.unit.engine.cuda_device import kernel_device, needs_cuda

DEVICE = kernel_device()

# After the skip: these import Triton.
from engine.cuda.decode_graphs import DecodeInputs, batch_sizes  # noqa: E402
from engine.cuda.eager_steps import EagerSteps  # noqa: E402
from engine.cuda.executor import CudaExecutor  # noqa: E402
from engine.cuda.paged_attention import PagedAttention  # noqa: E402
from engine.cuda.upload import PinnedWords  # noqa: E402

BLOCK_SIZE = 16
MAX_NUM_SEQS = 33


class Replayed:
    """What `CudaExecutor` does, less the graphs: their inputs are filled as ever, and computed from at once."""

    def __init__(self, loaded: LoadedModel, cache: KVCache, max_blocks: int) -> None:
        self._model = loaded.model
        paged = PagedAttention(cache, num_heads=loaded.config.num_heads, max_keys=max_blocks * BLOCK_SIZE)
        self._eager = EagerSteps(loaded.model, paged)
        self._eager.warm_up()
        num_words = DecodeInputs.num_words(MAX_NUM_SEQS, max_blocks)
        host, words = PinnedWords(DEVICE, num_words), torch.empty(num_words, dtype=torch.int64, device=DEVICE)
        self._inputs = {size: DecodeInputs(host, words, paged, size, max_blocks) for size in batch_sizes(MAX_NUM_SEQS)}
        for inputs in self._inputs.values():
            inputs.clear()
            self._model.forward(inputs.batch, inputs.attention)

    def forward(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        if batch.query_lens.max() > 1:
            return self._eager.forward(batch)
        inputs = next(inputs for size, inputs in self._inputs.items() if size >= len(batch.query_lens))
        inputs.fill(batch)
        return self._model.forward(inputs.batch, inputs.attention)[: len(batch.query_lens)]

    def logits(self, hidden: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
        return self._model.logits(hidden)


class Texts:
    """Texts computed side by side in one cache, whose blocks are scattered and begin as NaN."""

    def __init__(self, loaded: LoadedModel, texts: Sequence[Sequence[int]], *, compiled: bool = False) -> None:
        self.texts = [list(text) for text in texts]
        self.num_computed = [0] * len(texts)
        self.logits: list[list[torch.Tensor]] = [[] for _ in texts]
        blocks_each = -(-max(map(len, texts)) // BLOCK_SIZE)
        # Block 0 belongs to no text: with it tables are padded.
        order = torch.randperm(len(texts) * blocks_each, generator=torch.Generator().manual_seed(1)) + 1
        self.tables = order.view(len(texts), blocks_each)
        self.cache = KVCache(
            loaded.config,
            num_blocks=len(order) + 1,
            block_size=BLOCK_SIZE,
            dtype=next(loaded.model.parameters()).dtype,
            device=DEVICE,
        )
        self.cache.data.zero_()
        if compiled:
            compile_layers(loaded.model, self.cache)
        self.executor = _executor(loaded, self.cache, blocks_each)
        assert not self.cache.data.any(), "warming up writes nowhere"
        self.cache.data.fill_(torch.nan)

    def step(self, num_tokens: dict[int, int]) -> None:
        """Computes the next tokens, as many as said, of each text named, in the order named."""
        names = list(num_tokens)
        query_lens = np.array(list(num_tokens.values()))
        begins = np.array([self.num_computed[text] for text in names])
        seq_lens = begins + query_lens
        positions = torch.cat([torch.arange(begin, end) for begin, end in zip(begins, seq_lens, strict=True)])
        owners = torch.from_numpy(np.repeat(names, query_lens))
        blocks = self.tables[owners, positions // BLOCK_SIZE]
        tables = self.tables[names, : -(-int(seq_lens.max()) // BLOCK_SIZE)]
        past_end = torch.arange(tables.shape[1]) >= torch.from_numpy(-(-seq_lens // BLOCK_SIZE)).unsqueeze(1)
        batch = Batch(
            input_ids=torch.tensor([self.texts[text][at] for text, at in zip(owners, positions, strict=True)]),
            positions=positions,
            slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
            query_lens=query_lens,
            seq_lens=seq_lens,
            block_tables=tables.masked_fill(past_end, 0),
            output_lens=query_lens,
        )
        logits = self.executor.logits(self.executor.forward(batch)).cpu()
        assert len(logits) == len(positions)
        for text, part in zip(names, torch.split(logits, query_lens.tolist()), strict=True):
            self.num_computed[text] += len(part)
            self.logits[text].append(part.clone())

    def logits_of(self, text: int) -> torch.Tensor:
        """[tokens, vocab]"""
        assert self.num_computed[text] == len(self.texts[text])
        return torch.cat(self.logits[text])


def _executor(loaded: LoadedModel, cache: KVCache, max_blocks: int) -> ModelExecutor:
    if DEVICE.type == "cpu":
        return Replayed(loaded, cache, max_blocks)
    return CudaExecutor(loaded.model, loaded.config.num_heads, cache, max_num_seqs=MAX_NUM_SEQS, max_blocks=max_blocks)


def load(directory: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(str(directory), dtype, DEVICE, lambda done, total: None)


# The interpreter is slow: it gets every chunk size once, and every shape once.
CHUNKS = [
    pytest.param(shape, chunk, marks=() if shape == "gqa" or chunk == 64 else needs_cuda)
    for shape in ("gqa", "mha", "mqa-tied", "wide-heads", "biases", "rope-llama3", "rope-yarn")
    for chunk in (1, 7, 64, 150)
]


@pytest.mark.parametrize(("shape", "chunk"), CHUNKS)
def test_chunked_prefill_equals_transformers(tiny_llama: Callable[[str], Path], shape: str, chunk: int) -> None:
    directory = tiny_llama(shape)
    text = random_text(150)
    texts = Texts(load(directory), [text])
    for begin in range(0, len(text), chunk):
        texts.step({0: min(chunk, len(text) - begin)})
    assert_same_logits(texts.logits_of(0), reference_logits(directory, text))


def test_sequences_at_different_stages_share_steps(tiny_llama: Callable[[str], Path]) -> None:
    directory = tiny_llama("gqa")
    lengths = [40, 230, 3, 61, 17, 18, 1]
    texts = Texts(load(directory), [random_text(length, seed) for seed, length in enumerate(lengths)])
    texts.step({1: 200, 4: 10})
    texts.step({5: 11, 1: 25, 0: 30, 4: 1})
    texts.step({4: 1, 5: 1, 1: 1, 2: 1, 3: 30})
    texts.step({3: 30, 2: 1, 5: 1, 6: 1, 1: 1, 4: 1, 0: 1})
    texts.step({5: 1, 0: 1, 2: 1})
    left = {text: length - texts.num_computed[text] for text, length in enumerate(lengths)}
    texts.step({text: count for text, count in left.items() if count})
    for text, tokens in enumerate(texts.texts):
        assert_same_logits(texts.logits_of(text), reference_logits(directory, tokens))


def test_decodes_of_every_batch_size_equal_the_whole_text(tiny_llama: Callable[[str], Path]) -> None:
    directory = tiny_llama("gqa")
    loaded = load(directory)
    lengths = [5 + 2 * index for index in range(MAX_NUM_SEQS)]
    tokens = [random_text(length, seed) for seed, length in enumerate(lengths)]
    texts = Texts(loaded, tokens)
    texts.step({text: length - 3 for text, length in enumerate(lengths)})
    # All that are recorded, and sizes between: 33, then 20 and 13, then 17, 9, 4, 2 and 1.
    texts.step(dict.fromkeys(reversed(range(33)), 1))
    texts.step(dict.fromkeys(range(20), 1))
    texts.step(dict.fromkeys(range(20, 33), 1))
    first = 0
    for size in (17, 9, 4, 2, 1):
        texts.step(dict.fromkeys(range(first, first + size), 1))
        first += size
    assert first == MAX_NUM_SEQS
    for text in range(0, MAX_NUM_SEQS, 4):
        assert_same_logits(texts.logits_of(text), reference_logits(directory, tokens[text]))


def test_padding_touches_no_block(tiny_llama: Callable[[str], Path]) -> None:
    texts = Texts(load(tiny_llama("gqa")), [random_text(20, seed) for seed in range(3)])
    texts.step({0: 10, 1: 10, 2: 10})
    texts.step({0: 1, 1: 1, 2: 1})
    # Three decodes are padded to four. A token's K and V are the only numbers that a cache of NaN has.
    num_stored = (~texts.cache.data[:, 0, 0, 0, :, 0].isnan()).sum()
    assert num_stored == 3 * 11


def test_blocks_may_be_shared(tiny_llama: Callable[[str], Path]) -> None:
    """A text that begins as another goes on from that one's blocks: prefix reuse."""
    directory = tiny_llama("gqa")
    first = random_text(60)
    second = first[:48] + random_text(9, seed=5)
    texts = Texts(load(directory), [first, second])
    texts.step({0: len(first)})
    texts.tables[1, :3] = texts.tables[0, :3]
    texts.num_computed[1] = 48
    texts.step({1: len(second) - 48})
    assert_same_logits(torch.cat(texts.logits[1]), reference_logits(directory, second)[48:])


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


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=needs_cuda), "float16"])
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


@needs_cuda
def test_a_real_model_decodes_in_bfloat16(smollm2: Path) -> None:
    """Recorded steps and chunks come to the same logits, within the noise of bfloat16."""
    loaded = load(smollm2, "bfloat16")
    text = random_text(100)
    whole, decoded = Texts(loaded, [text]), Texts(loaded, [text])
    whole.step({0: 100})
    decoded.step({0: 60})
    for _ in range(40):
        decoded.step({0: 1})
    expected = whole.logits_of(0)
    assert (decoded.logits_of(0) - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 31, 32, 33, 64, 100])
def test_recorded_sizes_reach_the_most_sequences(max_num_seqs: int) -> None:
    sizes = batch_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == max_num_seqs
    assert all(larger <= max(2 * smaller, smaller + 32) for smaller, larger in pairwise(sizes))


@needs_cuda
@pytest.mark.slow
@pytest.mark.timeout(600)
# Torch's compiler uses what torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_layers_are_recorded_as_well(
    tiny_llama: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    directory = tiny_llama("gqa")
    text = random_text(60)
    texts = Texts(load(directory), [text], compiled=True)
    texts.step({0: 50})
    for _ in range(10):
        texts.step({0: 1})
    assert_same_logits(texts.logits_of(0), reference_logits(directory, text))
