"""Runs a step's plan: lays its tokens end to end, one forward pass, logits of the rows that need them, sampling.

The runner's memory is by seat: a running request's block table and sampling state, written over when the seat gets
its next request. So nothing need be told when a request ends.
"""

from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Batch
from engine.executor import ModelExecutor
from engine.request import Request
from engine.sampler import SamplingState, sample, token_logprobs
from engine.step import ScheduledRequest, StepPlan, StepResult
from pdmesh.types import TokenLogprob

# Rows of prompt logits computed at once: vocabularies are large.
_PROMPT_LOGITS_ROWS = 64


class ModelRunner:
    """Batches, and what became of them, for one executor. Not thread-safe.

    Args:
        device: Where the executor computes.
        block_size: Tokens in a KV block.
        vocab_size: Width of the model's logits.
        num_seats: Requests in a batch at most.
        max_blocks: Blocks of a request at most.
    """

    def __init__(
        self,
        executor: ModelExecutor,
        *,
        device: torch.device,
        block_size: int,
        vocab_size: int,
        num_seats: int,
        max_blocks: int,
    ) -> None:
        self._executor = executor
        self._device = device
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._block_tables: npt.NDArray[np.int64] = np.zeros((num_seats, max_blocks), dtype=np.int64)
        self._states: list[SamplingState | None] = [None] * num_seats

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Computes the plan's tokens, writing their KV, and samples where the plan says so. `plan` has at least one."""
        batch = self.build_batch(plan)
        hidden = self._executor.forward(batch)
        result = StepResult(sampled=[])
        sampling = [item.request for item in plan.scheduled if item.samples]
        if sampling:
            states = [self._states[request.seat] or self._new_state(request) for request in sampling]
            result.sampled.extend(sample(self._executor.logits(hidden[batch.logits_rows]), sampling, states))
        first_row = 0
        for item in plan.scheduled:
            if item.request.prompt_logprobs is not None:
                result.prompt_logprobs[item.request] = self._prompt_logprobs(item, hidden[first_row:])
            first_row += item.num_tokens
        return result

    def build_batch(self, plan: StepPlan) -> Batch:
        """The tensors of a plan. Work in Python is per request; what is per token or per block is numpy's."""
        scheduled = plan.scheduled
        for item in scheduled:
            if item.fresh:
                self._states[item.request.seat] = None
            if item.num_new_blocks:
                table = item.request.block_table
                first_new = len(table) - item.num_new_blocks
                self._block_tables[item.request.seat, first_new : len(table)] = table[first_new:]
        seats = np.array([item.request.seat for item in scheduled])
        query_lens = np.array([item.num_tokens for item in scheduled])
        context_lens = np.array([item.request.num_computed_tokens for item in scheduled])
        seq_lens = query_lens + context_lens
        ends = query_lens.cumsum()
        # A token's position: its row, less the sequence's first row, plus the tokens before this step.
        positions = np.arange(ends[-1]) + np.repeat(seq_lens - ends, query_lens)
        blocks = self._block_tables[np.repeat(seats, query_lens), positions // self._block_size]
        slot_mapping = blocks * self._block_size + positions % self._block_size
        max_blocks = max(len(item.request.block_table) for item in scheduled)
        block_tables = self._block_tables[seats, :max_blocks]
        lengths = np.array([len(item.request.block_table) for item in scheduled])
        block_tables[np.arange(max_blocks) >= lengths[:, None]] = 0
        token_ids = chain.from_iterable(
            item.request.token_ids[context_len : context_len + item.num_tokens]
            for item, context_len in zip(scheduled, context_lens.tolist(), strict=True)
        )
        return Batch(
            input_ids=torch.from_numpy(np.fromiter(token_ids, np.int64, count=int(ends[-1]))).to(self._device),
            positions=torch.from_numpy(positions).to(self._device),
            slot_mapping=torch.from_numpy(slot_mapping).to(self._device),
            query_lens=query_lens,
            seq_lens=seq_lens,
            block_tables=torch.from_numpy(block_tables).to(self._device),
            logits_rows=torch.from_numpy(ends[[item.samples for item in scheduled]] - 1).to(self._device),
        )

    def _new_state(self, request: Request) -> SamplingState:
        state = self._states[request.seat] = SamplingState(request, self._vocab_size, self._device)
        return state

    def _prompt_logprobs(self, item: ScheduledRequest, hidden: torch.Tensor) -> list[TokenLogprob]:
        """Of the prompt tokens that follow the item's tokens, each judged by the hidden row before it."""
        request = item.request
        first = request.num_computed_tokens + 1
        targets = request.token_ids[first : min(first + item.num_tokens, request.num_prompt_tokens)]
        num_top = request.sampling.prompt_logprobs or 0
        logprobs: list[TokenLogprob] = []
        for start in range(0, len(targets), _PROMPT_LOGITS_ROWS):
            part = targets[start : start + _PROMPT_LOGITS_ROWS]
            logprobs += token_logprobs(self._executor.logits(hidden[start : start + len(part)]), part, num_top)
        return logprobs
