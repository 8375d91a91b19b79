"""Decode steps recorded as CUDA graphs: the host starts a whole step by one copy and one launch.

A graph reads its inputs from fixed memory and has fixed sizes, so there is one for each of a few batch sizes, and a
step is padded to the next. Padding writes nowhere and sees nothing. How long the sequences are is read on the device:
it changes nothing that a graph records.
"""

import logging
import time
from typing import Final

import numpy as np
import torch

from engine.batch import Batch
from engine.cuda.paged_attention import DeviceStep, PagedAttention, TritonAttention
from engine.cuda.upload import PinnedWords, aligned
from engine.models.causal_lm import CausalLM

log = logging.getLogger(__name__)

# Padding is cheap while reading the weights takes most of a step; from here on a size is at most so much too large.
_LARGEST_STEP: Final = 32


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Sizes to record, ascending: 1, 2, 4, …, 32, 64, 96, …, max_num_seqs."""
    sizes = [1 << power for power in range(_LARGEST_STEP.bit_length() - 1)]
    sizes += range(_LARGEST_STEP, max_num_seqs, _LARGEST_STEP)
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeInputs:
    """The inputs of a step of `num_seqs` decodes, in fixed memory: input ids, positions, slots, block tables.

    Tables lie column by column, so that what a step needs of all arrays is one run of words, and one copy.

    Args:
        host, device: Shared with inputs of other sizes, whose steps run before or after. At least `num_words` each.
        max_blocks: Blocks of a sequence at most.
    """

    def __init__(self, host: PinnedWords, device: torch.Tensor, paged: PagedAttention, num_seqs: int, max_blocks: int):
        self._num_seqs = num_seqs
        self._host = host
        self._device = device
        stride = aligned(num_seqs)
        self._first_table_word = 3 * stride
        input_ids, positions, slot_mapping = (device[i * stride :][:num_seqs] for i in range(3))
        tables = device[self._first_table_word :][: max_blocks * num_seqs].view(max_blocks, num_seqs).T
        every = torch.arange(num_seqs, device=device.device)
        ones = np.ones(num_seqs, np.int64)
        self.batch = Batch(
            input_ids=input_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            query_lens=ones,
            seq_lens=ones,
            block_tables=tables,
            output_lens=ones,
        )
        step = DeviceStep(
            positions, slot_mapping, tables, tokens=torch.stack((every, every)), tiles=every.new_empty(3, 0)
        )
        self.attention = TritonAttention(paged, step)

    def clear(self) -> None:
        """Makes all of the step padding."""
        self._device.fill_(-1)
        self.batch.input_ids.zero_()

    @staticmethod
    def num_words(num_seqs: int, max_blocks: int) -> int:
        return 3 * aligned(num_seqs) + max_blocks * num_seqs

    def fill(self, batch: Batch) -> None:
        """Sends a host batch of decodes, at most `num_seqs`, on its way to the device."""
        num_decodes, num_blocks = batch.block_tables.shape
        num_words = self._first_table_word + num_blocks * self._num_seqs
        self._host.wait()
        words = self._host.words
        arrays = words[: self._first_table_word].reshape(3, -1)
        arrays[0, :num_decodes] = batch.input_ids.numpy()
        arrays[0, num_decodes:] = 0
        arrays[1, :num_decodes] = batch.positions.numpy()
        arrays[1, num_decodes:] = -1
        arrays[2, :num_decodes] = batch.slot_mapping.numpy()
        arrays[2, num_decodes:] = -1
        tables = words[self._first_table_word : num_words].reshape(num_blocks, self._num_seqs)
        tables[:, :num_decodes] = batch.block_tables.numpy().T
        self._host.send(self._device[:num_words])


class DecodeGraphs:
    """Recorded steps of up to `max_num_seqs` decodes. They share their memory: each is done before the next begins."""

    def __init__(self, model: CausalLM, paged: PagedAttention, *, max_num_seqs: int, max_blocks: int) -> None:
        device = paged.kv_cache.device
        num_words = DecodeInputs.num_words(max_num_seqs, max_blocks)
        host = PinnedWords(device, num_words)
        words = torch.empty(num_words, dtype=torch.int64, device=device)
        self._sizes = batch_sizes(max_num_seqs)
        self._inputs: dict[int, DecodeInputs] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        began = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        # The largest first: what it needs, the others fit into.
        for size in reversed(self._sizes):
            inputs = DecodeInputs(host, words, paged, size, max_blocks)
            inputs.clear()
            # Compiles kernels and sets up libraries, which must not happen while recording.
            model.forward(inputs.batch, inputs.attention)
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden = model.forward(inputs.batch, inputs.attention)
            self._inputs[size], self._graphs[size], self._hidden[size] = inputs, graph, hidden
            log.info("recorded decode steps of %d sequences", size)
        log.info("recorded %d CUDA graphs in %.1f s", len(self._sizes), time.monotonic() - began)

    @property
    def max_num_seqs(self) -> int:
        return self._sizes[-1]

    def replay(self, batch: Batch) -> torch.Tensor:
        """The hidden states [B, hidden] of a host batch of B decodes, at most `max_num_seqs`. Valid until the next."""
        num_decodes = len(batch.query_lens)
        size = next(size for size in self._sizes if size >= num_decodes)
        self._inputs[size].fill(batch)
        self._graphs[size].replay()
        return self._hidden[size][:num_decodes]
