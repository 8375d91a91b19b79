"""A model that can be computed by hand, and that only a correct engine computes right.

    next token = (sum of all tokens so far * 31 + position of the last one) mod vocabulary

Each token's value is its "KV": `forward` writes it to the cache at its slot and reads the whole context back through
the block table. So a wrong slot, a wrong or stale block, or KV that was never computed gives a wrong token.
"""

from collections.abc import Callable, Sequence

import torch

from engine.attention import Attention
from engine.batch import Batch
from engine.decoder_config import AlibiPositions, DecoderLayers, NormConfig
from engine.loader import ALONE, LoadedModel, Split, fill_all
from engine.model_config import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.parallel.shard import shard_of
from engine.weights.quantized import UNQUANTIZED, Quantization

FAKE_CONFIG = ModelConfig(
    name="fake",
    architecture="Fake",
    vocab_size=97,
    hidden_size=1,
    intermediate_size=1,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    max_position=512,
    tie_word_embeddings=False,
    eos_token_ids=(),
    bos_token_id=None,
    layers=DecoderLayers(NormConfig("rms", 1e-6), AlibiPositions()),
)


def fake_next(token_ids: Sequence[int]) -> int:
    """The likeliest token after these."""
    return (sum(token_ids) * 31 + len(token_ids) - 1) % FAKE_CONFIG.vocab_size


def fake_output(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What greedy generation gives."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(fake_next(token_ids))
    return token_ids[len(prompt) :]


class FakeModel(CausalLM):
    """`on_forward` is called before each step computes: tests pause, count or fail there."""

    def __init__(self, on_forward: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._on_forward = on_forward

    def forward(self, batch: Batch, attention: Attention, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """[T, 1]: the likeliest next token after each token."""
        self._on_forward()
        kv_cache = attention.kv_cache
        size = kv_cache.block_size
        # [num_blocks, block_size]: the first number of each token's K.
        values = kv_cache.data[:, 0, 0, 0, :, 0]
        values[batch.slot_mapping // size, batch.slot_mapping % size] = batch.input_ids.to(values.dtype)
        likeliest = []
        for row, (query_len, seq_len) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
            blocks = batch.block_tables[row, : -(-seq_len // size)]
            context = values[blocks].flatten()[:seq_len].to(torch.int64)
            positions = torch.arange(seq_len)
            likeliest.append(((context.cumsum(0) * 31 + positions) % FAKE_CONFIG.vocab_size)[seq_len - query_len :])
        output = torch.cat(likeliest).unsqueeze(1)
        assert len(output) == len(batch.input_ids)
        return output

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab]: 0 for the likeliest token, a quarter less for each step (around the vocabulary) beyond it."""
        distance = (torch.arange(FAKE_CONFIG.vocab_size) - hidden) % FAKE_CONFIG.vocab_size
        return distance * -0.25


class FakeLoader:
    """Stands in for `engine.loader.load_model`."""

    def __init__(self, on_forward: Callable[[], None] = lambda: None) -> None:
        self._model = FakeModel(on_forward)

    def __call__(
        self,
        source: str,
        dtype: str,
        device: torch.device,
        on_progress: Callable[[int, int], None],
        split: Split = ALONE,
        keeps_stored: Callable[[ModelConfig], bool] = fill_all,
        quantization: Quantization = UNQUANTIZED,
    ) -> LoadedModel:
        on_progress(1, 1)
        return LoadedModel(
            self._model, FAKE_CONFIG, "0" * 64, shard_of(FAKE_CONFIG), torch.float32, num_bytes=0, model_bytes=0
        )
