"""Penalties, bias and masks: what changes a request's logits before a token is chosen or a logprob reported."""

from collections.abc import Sequence

import torch

from pdmesh.sampling import SamplingParams


class LogitEdits:
    """The edits of one request, with its token counts, kept up to date as tokens come.

    As vLLM and transformers define them: the repetition penalty covers prompt and output; presence and frequency
    penalties the output. Then the bias is added, then stop tokens are masked until min_tokens are out.
    """

    def __init__(self, sampling: SamplingParams, vocab_size: int, device: torch.device) -> None:
        self._sampling = sampling
        self._num_counted = 0
        self._repeats = sampling.repetition_penalty != 1.0
        self._counts = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        self._seen = torch.zeros(vocab_size if self._repeats else 0, dtype=torch.bool, device=device)
        self._output_counts = torch.zeros(vocab_size if self._counts else 0, dtype=torch.float32, device=device)
        self._bias_ids = torch.tensor(list(sampling.logit_bias), dtype=torch.int64, device=device)
        self._biases = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32, device=device)
        self._stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)

    @staticmethod
    def needed(sampling: SamplingParams) -> bool:
        """Whether any edit can ever change this request's logits."""
        return bool(
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
            or sampling.logit_bias
            or (sampling.min_tokens and sampling.stop_token_ids)
        )

    def apply(self, logits: torch.Tensor, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Edits `logits` [vocab] float32 in place, for the token that follows `token_ids` (prompt and output)."""
        self._count(token_ids, num_prompt_tokens)
        sampling = self._sampling
        if self._repeats:
            penalty = sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            torch.where(self._seen, penalised, logits, out=logits)
        if self._counts:
            logits.sub_(self._output_counts, alpha=sampling.frequency_penalty)
            logits.sub_((self._output_counts > 0).float(), alpha=sampling.presence_penalty)
        if len(self._bias_ids):
            logits.index_add_(0, self._bias_ids, self._biases)
        if len(token_ids) - num_prompt_tokens < sampling.min_tokens:
            logits.index_fill_(0, self._stop_ids, float("-inf"))

    def _count(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Counts the tokens that came since the last call: usually one."""
        if not (self._repeats or self._counts) or self._num_counted == len(token_ids):
            return
        new = torch.tensor(token_ids[self._num_counted :], dtype=torch.int64, device=self._seen.device)
        if self._repeats:
            self._seen.index_fill_(0, new, True)
        if self._counts:
            output = new[max(0, num_prompt_tokens - self._num_counted) :]
            self._output_counts.index_add_(0, output, torch.ones(len(output), device=output.device))
        self._num_counted = len(token_ids)
