"""Steps of any shape, module by module: those that hold chunks of prompts, whose shapes are never twice the same."""

import time
from dataclasses import replace

import numpy as np
import torch

from engine.batch import Batch
from engine.cuda.attention_work import MAX_TOKENS_ALONE, attention_work
from engine.cuda.paged_attention import DeviceStep, PagedAttention, TritonAttention
from engine.cuda.upload import Uploader
from engine.executor import wanted_states
from engine.models.causal_lm import CausalLM


class EagerSteps:
    """Runs host batches; what it returns is new memory."""

    def __init__(self, model: CausalLM, paged: PagedAttention) -> None:
        self._model = model
        self._paged = paged
        self._uploader = Uploader(paged.kv_cache.device)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The hidden states [R, hidden] that a host batch asks for."""
        work = attention_work(batch.query_lens, batch.seq_lens, self._paged.tile_tokens)
        host = (batch.input_ids, batch.positions, batch.slot_mapping, batch.block_tables)
        input_ids, positions, slot_mapping, block_tables, tokens, tiles = self._uploader.upload(
            [*(tensor.numpy() for tensor in host), work.tokens, work.tiles]
        )
        on_device = replace(
            batch, input_ids=input_ids, positions=positions, slot_mapping=slot_mapping, block_tables=block_tables
        )
        step = DeviceStep(positions, slot_mapping, block_tables, tokens, tiles)
        return wanted_states(self._model.forward(on_device, TritonAttention(self._paged, step)), batch)

    def warm_up(self) -> float:
        """Compiles what the first prompt would wait for, and says how many seconds that took. Writes to no block."""
        began = time.monotonic()
        # A chunk, and a decode beside it.
        query_lens = np.array([MAX_TOKENS_ALONE + 1, 1])
        num_tokens = int(query_lens.sum())
        zeros = torch.zeros(num_tokens, dtype=torch.int64)
        batch = Batch(
            input_ids=zeros,
            positions=zeros,
            slot_mapping=zeros - 1,
            query_lens=query_lens,
            seq_lens=query_lens,
            block_tables=torch.zeros(2, 1, dtype=torch.int64),
            output_lens=query_lens,
        )
        # Brought to the host, the logits are done.
        self._model.logits(self.forward(batch)).cpu()
        return time.monotonic() - began
