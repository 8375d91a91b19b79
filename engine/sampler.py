"""Chooses the next token of each request from its logits.

Random choices take the Gumbel-max form: of the candidates, the token with the greatest logit / temperature + noise,
which picks each with its softmax probability. The noise of (request, output index i, token v) is a pure function of
(seed, completion_index, i, v), so a request goes on with the same tokens on any worker and in any batch. Workers'
logits differ by rounding, perhaps by 1e-6; here such a difference changes a token with a probability of about 1e-6,
for two scores must come that close. Inverting the cumulative distribution over sorted probabilities would not have
that property: where two neighbours in the order swap places, every draw that falls between them changes.
"""

from collections.abc import Sequence

import torch

from engine.counter_rng import gumbel, stream_key
from engine.logit_edits import LogitEdits
from engine.request import Request
from engine.step import SampledToken
from pdmesh.errors import InternalError
from pdmesh.types import TokenLogprob

# Gumbel noise over uniforms in steps of 2^-32 lies within (-3.2, 22.9): a token this far below the likeliest one is
# never chosen, so no noise need be drawn for it.
_NEVER = 26.5

# Logits of random choices worked on at once: bounds the memory, and on a CPU keeps it in the caches.
_MAX_ELEMENTS_CPU = 1 << 17
_MAX_ELEMENTS_CUDA = 1 << 22

# Likeliest tokens first looked at to find the end of top_p; where they do not reach it, more and more are.
_TOP_P_GUESS = 512


class SamplingState:
    """What the sampler keeps of a request while that has a seat; can be made anew from the request at any time."""

    __slots__ = ("edits", "key", "plain_greedy")

    def __init__(self, request: Request, vocab_size: int, device: torch.device) -> None:
        sampling = request.sampling
        self.key = stream_key(sampling.seed, request.source.completion_index)
        self.edits = LogitEdits(sampling, vocab_size, device) if LogitEdits.needed(sampling) else None
        self.plain_greedy = sampling.greedy and sampling.logprobs is None and self.edits is None


def sample(logits: torch.Tensor, requests: Sequence[Request], states: Sequence[SamplingState]) -> list[SampledToken]:
    """The next token of each request.

    Args:
        logits: [R, vocab] float32, one row for each request; overwritten.
        states: Parallel to `requests`.

    Raises InternalError where logits are not finite.
    """
    if all(state.plain_greedy for state in states):
        return [SampledToken(token_id) for token_id in _likeliest(logits).tolist()]
    for row, (request, state) in enumerate(zip(requests, states, strict=True)):
        if state.edits is not None:
            state.edits.apply(logits[row], request.token_ids, request.num_prompt_tokens)
    chosen = _likeliest(logits)
    random_rows = [row for row, request in enumerate(requests) if not request.sampling.greedy]
    max_elements = _MAX_ELEMENTS_CPU if logits.device.type == "cpu" else _MAX_ELEMENTS_CUDA
    per_slice = max(1, max_elements // logits.shape[1])
    for start in range(0, len(random_rows), per_slice):
        rows = random_rows[start : start + per_slice]
        index = torch.tensor(rows, device=logits.device)
        chosen[index] = _draw(logits[index], [requests[row] for row in rows], [states[row].key for row in rows])
    token_ids = chosen.tolist()
    sampled = [SampledToken(token_id) for token_id in token_ids]
    for row, request in enumerate(requests):
        if request.sampling.logprobs is not None:
            [logprob] = token_logprobs(logits[row : row + 1], [token_ids[row]], request.sampling.logprobs)
            sampled[row] = SampledToken(token_ids[row], logprob)
    return sampled


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of one token for each row of `logits` [N, vocab], and of the `num_top` likeliest."""
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


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    values, token_ids = logits.max(dim=-1)
    if not values.isfinite().all():
        raise InternalError("the model's logits are not finite: its weights or its KV cache are damaged")
    return token_ids


def _draw(logits: torch.Tensor, requests: Sequence[Request], keys: Sequence[int]) -> torch.Tensor:
    """A token id for each row of `logits` [S, vocab] float32, drawn from its truncated distribution."""
    device = logits.device
    params = [request.sampling for request in requests]
    # Below 1e-6 nothing but the likeliest token is left, and float32 would come to divide by 0.
    temperatures = torch.tensor([max(p.temperature, 1e-6) for p in params], dtype=torch.float32, device=device)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures.unsqueeze(1)
    thresholds = torch.full((len(params),), -_NEVER, device=device)
    if any(p.min_p > 0 for p in params):
        min_ps = torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device)
        thresholds = thresholds.maximum(min_ps.log())
    truncated = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1.0]
    if truncated:
        index = torch.tensor(truncated, device=device)
        ends = _truncation_thresholds(
            scaled[index], [params[r].top_k for r in truncated], [params[r].top_p for r in truncated]
        )
        thresholds[index] = thresholds[index].maximum(ends)

    kept = scaled >= thresholds.unsqueeze(1)
    first_counters = torch.tensor([request.num_output_tokens for request in requests], device=device) << 32
    row_keys = torch.tensor(keys, device=device)
    # Noise for each token, or for the few that are kept: the same numbers, whichever is less work.
    if int(kept.count_nonzero()) * 4 > kept.numel():
        counters = first_counters.unsqueeze(1) | torch.arange(logits.shape[1], device=device)
        noise = gumbel(counters, row_keys.unsqueeze(1))
        scores = noise.add_(scaled).masked_fill_(kept.logical_not_(), float("-inf"))
    else:
        rows, token_ids = kept.nonzero(as_tuple=True)
        noise = gumbel(first_counters[rows] | token_ids, row_keys[rows])
        scores = torch.full(scaled.shape, float("-inf"), dtype=torch.float64, device=device)
        scores[rows, token_ids] = noise.add_(scaled[rows, token_ids])
    return scores.argmax(dim=-1)


def _truncation_thresholds(
    scaled: torch.Tensor, top_ks: Sequence[int], top_ps: Sequence[float], num_guessed: int = _TOP_P_GUESS
) -> torch.Tensor:
    """The least value [S] that top_k, and top_p over what top_k leaves, keep in each row of `scaled` [S, vocab].

    Values that tie with it are kept: a threshold does not depend on the order in which equal ones are sorted.
    """
    vocab_size = scaled.shape[1]
    num_sorted = min(vocab_size, max(top_k or num_guessed for top_k in top_ks))
    values = scaled.topk(num_sorted, dim=-1).values.double()
    kept = torch.tensor([min(top_k or vocab_size, vocab_size) for top_k in top_ks], device=scaled.device)
    beyond_top_k = torch.arange(num_sorted, device=scaled.device) >= kept.unsqueeze(1)
    among_top_k = values.masked_fill(beyond_top_k, float("-inf"))
    totals = torch.where(kept < vocab_size, among_top_k.logsumexp(dim=-1), scaled.logsumexp(dim=-1).double())
    cumulative = (among_top_k - totals.unsqueeze(1)).exp().cumsum(dim=-1)
    # A top_p of 1 is reached by no sum, whichever way that was rounded.
    targets = torch.tensor([p if p < 1.0 else 2.0 for p in top_ps], dtype=torch.float64, device=scaled.device)
    last = (cumulative < targets.unsqueeze(1)).sum(dim=-1).minimum(kept - 1)
    thresholds = values.gather(1, last.clamp(max=num_sorted - 1).unsqueeze(1)).squeeze(1).to(scaled.dtype)
    unreached = (last >= num_sorted).nonzero().squeeze(1)
    if len(unreached):
        rows = unreached.tolist()
        thresholds[unreached] = _truncation_thresholds(
            scaled[unreached], [top_ks[row] for row in rows], [top_ps[row] for row in rows], 16 * num_guessed
        )
    return thresholds
