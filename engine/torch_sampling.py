"""Choosing tokens with torch's own operations, on any device."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.counter_rng import gumbel
from engine.sampling_ops import Draws, not_finite
from pdmesh.types import TokenLogprob

# Logits of random choices worked on at once: bounds the memory, and on a CPU keeps it in the caches.
_MAX_ELEMENTS_CPU = 1 << 17
_MAX_ELEMENTS_CUDA = 1 << 22

# Likeliest tokens first looked at to find the end of top_p; where they do not reach it, more and more are.
_TOP_P_GUESS = 512


class TorchSampling:
    """Implements SamplingOps."""

    def likeliest(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        values, token_ids = logits.max(dim=-1)
        if not values.isfinite().all():
            raise not_finite()
        found: npt.NDArray[np.int64] = token_ids.cpu().numpy()
        return found

    def draw(self, logits: torch.Tensor, draws: Draws) -> npt.NDArray[np.int64]:
        max_elements = _MAX_ELEMENTS_CPU if logits.device.type == "cpu" else _MAX_ELEMENTS_CUDA
        per_slice = max(1, max_elements // logits.shape[1])
        drawn = [
            _draw(logits, draws, slice(start, start + per_slice)) for start in range(0, len(draws.rows), per_slice)
        ]
        return torch.cat(drawn).cpu().numpy()

    def logprobs(self, logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
        logprobs = logits.log_softmax(dim=-1)
        chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
        if not num_top:
            return [TokenLogprob(token_id, value) for token_id, value in zip(token_ids, chosen, strict=True)]
        values, ids = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
        tops = zip(ids.tolist(), values.tolist(), strict=True)
        return [
            TokenLogprob(token_id, value, tuple(zip(*top, strict=True)))
            for token_id, value, top in zip(token_ids, chosen, tops, strict=True)
        ]


def _draw(logits: torch.Tensor, draws: Draws, part: slice) -> torch.Tensor:
    """The token ids of a part of the draws, on the logits' device."""
    device = logits.device

    def of(values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values[part]).to(device)

    logits = logits[of(draws.rows)]
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / of(draws.temperatures).unsqueeze(1)
    thresholds = of(draws.floors).clone()
    truncated = np.flatnonzero((draws.top_ks[part] > 0) | (draws.top_ps[part] < 1.0))
    if len(truncated):
        index = torch.from_numpy(truncated).to(device)
        ends = _truncation_thresholds(scaled[index], of(draws.top_ks)[index], of(draws.top_ps)[index])
        thresholds[index] = thresholds[index].maximum(ends)

    kept = scaled >= thresholds.unsqueeze(1)
    counters, keys = of(draws.counters), of(draws.keys)
    # Noise for each token, or for the few that are kept: the same numbers, whichever is less work.
    if int(kept.count_nonzero()) * 4 > kept.numel():
        noise = gumbel(counters.unsqueeze(1) | torch.arange(logits.shape[1], device=device), keys.unsqueeze(1))
        scores = noise.add_(scaled).masked_fill_(kept.logical_not_(), float("-inf"))
    else:
        rows, token_ids = kept.nonzero(as_tuple=True)
        noise = gumbel(counters[rows] | token_ids, keys[rows])
        scores = torch.full(scaled.shape, float("-inf"), dtype=torch.float64, device=device)
        scores[rows, token_ids] = noise.add_(scaled[rows, token_ids])
    return scores.argmax(dim=-1)


def _truncation_thresholds(
    scaled: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, num_guessed: int = _TOP_P_GUESS
) -> torch.Tensor:
    """The least value [S] that top_k, and top_p over what top_k leaves, keep in each row of `scaled` [S, vocab]."""
    vocab_size = scaled.shape[1]
    num_sorted = min(vocab_size, int(top_ks.where(top_ks > 0, num_guessed).max()))
    values = scaled.topk(num_sorted, dim=-1).values.double()
    kept = top_ks.where(top_ks > 0, vocab_size).clamp(max=vocab_size)
    beyond_top_k = torch.arange(num_sorted, device=scaled.device) >= kept.unsqueeze(1)
    among_top_k = values.masked_fill(beyond_top_k, float("-inf"))
    totals = torch.where(kept < vocab_size, among_top_k.logsumexp(dim=-1), scaled.logsumexp(dim=-1).double())
    cumulative = (among_top_k - totals.unsqueeze(1)).exp().cumsum(dim=-1)
    # A top_p of 1 is reached by no sum, whichever way that was rounded.
    targets = top_ps.where(top_ps < 1.0, 2.0)
    last = (cumulative < targets.unsqueeze(1)).sum(dim=-1).minimum(kept - 1)
    thresholds = values.gather(1, last.clamp(max=num_sorted - 1).unsqueeze(1)).squeeze(1).to(scaled.dtype)
    unreached = (last >= num_sorted).nonzero().squeeze(1)
    if len(unreached):
        thresholds[unreached] = _truncation_thresholds(
            scaled[unreached], top_ks[unreached], top_ps[unreached], 16 * num_guessed
        )
    return thresholds
