"""Texts that a model computes step by step, cut and mixed as a test wants, and the logits that come of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from engine.batch import Batch
from engine.cpu.library import Kernels
from engine.cpu.packed_model import PackedModel, pack_model
from engine.cpu.packing import Packer
from engine.executor import ModelExecutor, TorchExecutor
from engine.kv_cache import PLAIN, KVCache, KVLayout
from engine.loader import LoadedModel, load_model
from engine.models.decoder import DecoderForCausalLM
from engine.weights.quantized import UNQUANTIZED, Quantization

CPU = torch.device("cpu")


def plain_torch(loaded: LoadedModel, kv_cache: KVCache) -> ModelExecutor:
    return TorchExecutor(loaded.model, kv_cache)


def load(
    directory: Path, dtype: str = "float32", *, stored: bool = False, quantization: Quantization = UNQUANTIZED
) -> LoadedModel:
    """With `stored`, its matrices are left for a packer."""
    return load_model(
        str(directory),
        dtype,
        CPU,
        lambda done, total: None,
        keeps_stored=lambda config: stored,
        quantization=quantization,
    )


def packed_for(
    loaded: LoadedModel,
    kernels: Kernels,
    num_threads: int = 2,
    quantization: Quantization = UNQUANTIZED,
    *,
    maps: bool = False,
) -> PackedModel:
    """The matrices of a model that is loaded with `stored`, for the CPU kernels; with `maps`, those that lie ready in
    their file stay there."""
    assert isinstance(loaded.model, DecoderForCausalLM)
    packer = Packer(kernels, loaded.stored, num_threads, quantization, maps=maps)
    packed = pack_model(loaded.model, loaded.config, packer)
    loaded.fill(CPU)
    return packed


class Texts:
    """Texts computed side by side in one cache, whose blocks are scattered and begin as NaN.

    Args:
        int8: What the cache stores.
        region: The cache holds but some heads and layers of its blocks: not the first, not the last.
        make_executor: Of the loaded model and the cache.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        texts: Sequence[Sequence[int]],
        *,
        block_size: int = 4,
        layout: KVLayout = PLAIN,
        int8: bool = False,
        region: bool = False,
        make_executor: Callable[[LoadedModel, KVCache], ModelExecutor] = plain_torch,
    ) -> None:
        self.loaded = loaded
        self.texts = [list(text) for text in texts]
        self.num_computed = [0] * len(texts)
        self.logits: list[list[torch.Tensor]] = [[] for _ in texts]
        blocks_each = -(-max(map(len, texts)) // block_size)
        # Block 0 belongs to no text: with it tables are padded.
        order = torch.randperm(len(texts) * blocks_each, generator=torch.Generator().manual_seed(1)) + 1
        self.tables = order.view(len(texts), blocks_each)
        dtype = loaded.dtype
        num_blocks = len(order) + 1
        config, kv_heads, layers = loaded.config, range(loaded.config.num_kv_heads), range(loaded.config.num_layers)
        if region:
            config = replace(config, num_kv_heads=len(kv_heads) + 2, num_layers=len(layers) + 2)
            kv_heads, layers = range(1, len(kv_heads) + 1), range(1, len(layers) + 1)
        self.cache = KVCache(
            config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            device=CPU,
            kv_dtype=torch.int8 if int8 else None,
            layout=layout,
            kv_heads=kv_heads,
            layers=layers,
        )
        (self.cache.data if self.cache.scales is None else self.cache.scales).fill_(torch.nan)
        self.executor = make_executor(loaded, self.cache)

    def step(self, num_tokens: dict[int, int], num_wanted: dict[int, int] | None = None) -> None:
        """Computes the next tokens, as many as said, of each text named, in the order named.

        Args:
            num_wanted: Of how many of each text's last tokens logits are computed; default: of all.
        """
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
            output_lens=np.array(list((num_wanted or num_tokens).values())),
        )
        hidden = self.executor.forward(batch)
        logits = self.executor.logits(hidden)
        parts = torch.split(logits, batch.output_lens.tolist())
        for (text, count), part in zip(num_tokens.items(), parts, strict=True):
            self.num_computed[text] += count
            self.logits[text].append(part.clone())

    def logits_of(self, text: int) -> torch.Tensor:
        """[tokens, vocab], or of the tokens that were wanted."""
        assert self.num_computed[text] == len(self.texts[text])
        return torch.cat(self.logits[text])


def random_text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@lru_cache(maxsize=2)
def reference_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' model of a checkpoint."""
    # Its faster way to compute experts knows no float64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **experts)


def reference_logits(directory: Path, text: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = reference_model(directory, dtype)(torch.tensor([text])).logits[0]
    return logits


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3 * float(expected.std()))
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
