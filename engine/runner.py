"""Runs a step's plan: lays its tokens end to end, one forward pass, logits of the rows that need them, sampling.

The runner's memory is by seat: a running request's block table, how far it is computed, its next token, its sampling
parameters. A decode is carried on from there; the requests themselves are looked at only where a plan says that
something has changed. A seat's memory is written over when it gets its next request, so nothing need be told when
one ends.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Batch
from engine.executor import StepExecutor
from engine.request import Request
from engine.sampler import Sampler
from engine.sampling_ops import SamplingOps
from engine.step import PrefillChunk, StepPlan, StepResult
from engine.torch_sampling import TorchSampling
from pdmesh.types import TokenLogprob

# Rows of prompt logits computed at once: vocabularies are large.
PROMPT_LOGITS_ROWS = 64


class ModelRunner:
    """Batches, and what became of them, for one executor. Not thread-safe.

    Of every plan the batch must be built and run, once and in order; after a failure, the requests of its plan are not
    run again.

    Args:
        device: Where the executor's logits lie.
        batch_device: Where it takes batches; default: there too.
        block_size: Tokens in a KV block.
        vocab_size: Width of the model's logits.
        num_seats: Requests in a batch at most.
        max_blocks: Blocks of a request at most.
        sampling: Does the sampler's arithmetic.
    """

    def __init__(
        self,
        executor: StepExecutor,
        *,
        device: torch.device,
        block_size: int,
        vocab_size: int,
        num_seats: int,
        max_blocks: int,
        batch_device: torch.device | None = None,
        sampling: SamplingOps | None = None,
    ) -> None:
        self._executor = executor
        self._batch_device = batch_device or device
        self._block_size = block_size
        self._sampler = Sampler(sampling or TorchSampling(), num_seats=num_seats, vocab_size=vocab_size, device=device)
        # By seat. Behind a request's blocks its row holds zeros.
        self._block_tables = np.zeros((num_seats, max_blocks), np.int64)
        self._context_lens = np.zeros(num_seats, np.int64)
        self._next_ids = np.zeros(num_seats, np.int64)
        self._decodes: tuple[Request, ...] = ()
        self._decode_seats = np.zeros(0, np.int64)

    @torch.inference_mode()
    def run(self, plan: StepPlan, batch: Batch) -> StepResult:
        """Computes the plan's tokens, writing their KV, and samples where it says so. `batch` was built of it."""
        self._executor.run(batch)
        self._context_lens[self._decode_seats] += 1
        prompt_logprobs: dict[Request, list[TokenLogprob]] = {}
        calls = iter(range(len(batch.logit_rows)))
        for chunk in plan.prefills:
            self._context_lens[chunk.request.seat] += chunk.num_tokens
            if chunk.request.prompt_logprobs is not None:
                prompt_logprobs[chunk.request] = self._prompt_logprobs(chunk, calls)
        token_ids, logprobs = self._sample(plan, calls)
        return StepResult(token_ids, logprobs, prompt_logprobs)

    def build_batch(self, plan: StepPlan) -> Batch:
        """The tensors of a plan that is not empty. What is per token, per block or per decode is numpy's work, not
        Python's."""
        self._take_in(plan)
        seats = self._decode_seats
        input_ids = self._next_ids[seats]
        positions = self._context_lens[seats]
        query_lens = np.ones_like(seats)
        seq_lens = positions + 1
        token_seats = seats
        output_lens = query_lens
        if plan.prefills:
            chunks = plan.prefills
            seats = np.append(seats, [chunk.request.seat for chunk in chunks])
            query_lens = np.append(query_lens, [chunk.num_tokens for chunk in chunks])
            seq_lens = self._context_lens[seats] + query_lens
            ends = query_lens.cumsum()
            input_ids = np.concatenate((input_ids, *map(_chunk_ids, chunks)))
            # A token's position: its row, less the sequence's first row, plus the tokens before this step.
            positions = np.arange(ends[-1]) + np.repeat(seq_lens - ends, query_lens)
            token_seats = np.repeat(seats, query_lens)
            output_lens = np.append(output_lens, [_num_outputs(chunk) for chunk in chunks])
        blocks, offsets = np.divmod(positions, self._block_size)
        return Batch(
            input_ids=self._on_device(input_ids),
            positions=self._on_device(positions),
            slot_mapping=self._on_device(self._block_tables[token_seats, blocks] * self._block_size + offsets),
            query_lens=query_lens,
            seq_lens=seq_lens,
            block_tables=self._on_device(self._block_tables[seats, : blocks.max() + 1]),
            output_lens=output_lens,
            logit_rows=tuple(_logit_rows(plan, output_lens)),
        )

    def _take_in(self, plan: StepPlan) -> None:
        """What the plan says has changed since the last one."""
        for request in plan.seated:
            seat, table = request.seat, request.block_table
            self._block_tables[seat, : len(table)] = table
            self._block_tables[seat, len(table) :] = 0
            self._context_lens[seat] = request.num_computed_tokens
            self._next_ids[seat] = request.token_ids[-1]
            self._sampler.seat(request)
        for request in plan.grown:
            self._block_tables[request.seat, len(request.block_table) - 1] = request.block_table[-1]
        if plan.decodes is not self._decodes:
            self._decodes = plan.decodes
            self._decode_seats = np.array([request.seat for request in plan.decodes], np.int64)

    def _sample(self, plan: StepPlan, calls: Iterator[int]) -> tuple[list[int], dict[Request, TokenLogprob]]:
        """The next tokens of those that sample, in the plan's order, and their logprobs."""
        requests: Sequence[Request] = plan.decodes
        seats = self._decode_seats
        if ended := [chunk.request for chunk in plan.prefills if chunk.samples]:
            requests = [*requests, *ended]
            seats = np.append(seats, [request.seat for request in ended])
        if not requests:
            return [], {}
        logits = self._executor.logits(next(calls))
        token_ids = self._sampler.sample(logits, requests, seats)
        self._next_ids[seats] = token_ids
        return token_ids.tolist(), self._sampler.logprobs(logits, requests, seats, token_ids)

    def _prompt_logprobs(self, chunk: PrefillChunk, calls: Iterator[int]) -> list[TokenLogprob]:
        """Of the prompt tokens that follow the chunk's tokens, each judged by the hidden row before it."""
        request = chunk.request
        first = request.num_computed_tokens + 1
        targets = request.token_ids[first : first + _num_judged(chunk)]
        num_top = request.sampling.prompt_logprobs or 0
        logprobs: list[TokenLogprob] = []
        for start in range(0, len(targets), PROMPT_LOGITS_ROWS):
            logits = self._executor.logits(next(calls))
            logprobs += self._sampler.judge(logits, targets[start : start + PROMPT_LOGITS_ROWS], num_top)
        return logprobs

    def _on_device(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._batch_device)


def _num_outputs(chunk: PrefillChunk) -> int:
    """Of how many of the chunk's last tokens somebody reads the hidden states."""
    if chunk.request.prompt_logprobs is not None:
        return chunk.num_tokens
    return int(chunk.samples)


def _num_judged(chunk: PrefillChunk) -> int:
    """How many prompt tokens follow the chunk's tokens, each one after one of them; the last may be an output's."""
    request = chunk.request
    return min(chunk.num_tokens, request.num_prompt_tokens - request.num_computed_tokens - 1)


def _logit_rows(plan: StepPlan, output_lens: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """Of the wanted states, which logits are asked for: those that judge prompt tokens, some at a time; at last those
    that somebody samples from."""
    ends = output_lens.cumsum()
    for chunk, end in zip(plan.prefills, ends[len(plan.decodes) :], strict=True):
        if chunk.request.prompt_logprobs is not None:
            rows = np.arange(end - chunk.num_tokens, end)[: max(0, _num_judged(chunk))]
            for start in range(0, len(rows), PROMPT_LOGITS_ROWS):
                yield rows[start : start + PROMPT_LOGITS_ROWS]
    samples = np.array([True] * len(plan.decodes) + [chunk.samples for chunk in plan.prefills])
    if samples.any():
        yield ends[samples] - 1


def _chunk_ids(chunk: PrefillChunk) -> npt.NDArray[np.int64]:
    request = chunk.request
    first = request.num_computed_tokens
    return np.array(request.token_ids[first : first + chunk.num_tokens], np.int64)
