"""Which workers serve a prompt: pure arithmetic over what the registry and the prefix index say.

Every worker has one cost, in prompt tokens to compute; the lowest wins:

    cost =                    tokens of the prompt not cached there
         + LOAD_COST       *  tokens cached there, but not in the pool
         + queue_weight    *  prompt tokens queued there
         + request_weight  *  requests there, running or waiting
         + pressure_weight *  prompt tokens * used / free KV blocks

The last term grows without bound as the KV cache fills up: what a request would push out, or wait for. Equal costs go
to whoever had no request for longest.

The decode worker is chosen first, prefill workers among those that can pair with it. Where the decode worker lacks only
a short rest of the prompt, or no prefill worker can pair with it, it computes the rest itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_PREFILL_TARGETS = 3
# Of bringing one token's KV into the pool from host memory or disk, in tokens to compute. By arithmetic, not measured:
# an 8B model on an H100 takes some 40 µs for a prompt token, and its 128 KiB of KV take 5 µs over PCIe and 20 µs or
# more from an SSD. Rather low, since what is loaded leaves the processor to others.
LOAD_COST = 0.2


@dataclass(frozen=True, slots=True)
class Weights:
    """See the module."""

    queue: float = 1.0
    request: float = 16.0
    pressure: float = 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that could take the prompt.

    Attributes:
        cached_tokens: Leading tokens of the prompt that lie in its cache, in whatever tier.
        pool_tokens: How many of these lie in its pool; the others are to be loaded first.
        queued_tokens: Prompt tokens waiting to be computed there.
        num_requests: Running or waiting there.
        used_blocks, num_blocks: KV blocks that requests hold, and blocks in all.
        turn: Grows each time it is given a request.
        pairs_with: For a decode worker: the ids of prefill workers whose KV it can take.
    """

    worker_id: str
    cached_tokens: int = 0
    pool_tokens: int = 0
    queued_tokens: int = 0
    num_requests: int = 0
    used_blocks: int = 0
    num_blocks: int = 0
    turn: int = 0
    pairs_with: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a prompt goes. Without prefill workers, the decode worker computes it.

    Attributes:
        prefill_ids: Best first; the later ones are asked where the first cannot.
        decode_tokens, prefill_tokens: Uncached tokens that each side's first worker has to compute.
    """

    decode_id: str
    prefill_ids: tuple[str, ...] = ()
    decode_tokens: int = 0
    prefill_tokens: int = 0


def uncached_tokens(candidate: Candidate, num_tokens: int) -> int:
    """Tokens of a prompt of `num_tokens` to compute there: at least the last one, whose logits are wanted."""
    return num_tokens - min(candidate.cached_tokens, num_tokens - 1)


def cost(candidate: Candidate, num_tokens: int, weights: Weights) -> float:
    """The cost of a prompt of `num_tokens` tokens at this worker; see the module."""
    free_blocks = max(candidate.num_blocks - candidate.used_blocks, 1)
    return (
        uncached_tokens(candidate, num_tokens)
        + LOAD_COST * (candidate.cached_tokens - candidate.pool_tokens)
        + weights.queue * candidate.queued_tokens
        + weights.request * candidate.num_requests
        + weights.pressure * num_tokens * candidate.used_blocks / free_blocks
    )


def rank(
    num_tokens: int,
    decode: Iterable[Candidate],
    prefill: Iterable[Candidate],
    weights: Weights,
    short_prefill_tokens: int,
) -> list[Choice]:
    """All places for a prompt of `num_tokens` tokens, best first: one for each decode worker."""
    ranked_prefill = _by_cost(prefill, num_tokens, weights)
    return [
        _choice(candidate, ranked_prefill, num_tokens, short_prefill_tokens)
        for candidate in _by_cost(decode, num_tokens, weights)
    ]


def _by_cost(candidates: Iterable[Candidate], num_tokens: int, weights: Weights) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: (cost(candidate, num_tokens, weights), candidate.turn))


def _choice(decode: Candidate, prefill: Sequence[Candidate], num_tokens: int, short_prefill_tokens: int) -> Choice:
    uncached = uncached_tokens(decode, num_tokens)
    if uncached > short_prefill_tokens:
        targets = [candidate for candidate in prefill if candidate.worker_id in decode.pairs_with]
        if targets:
            return Choice(
                decode.worker_id,
                tuple(target.worker_id for target in targets[:MAX_PREFILL_TARGETS]),
                prefill_tokens=uncached_tokens(targets[0], num_tokens),
            )
    return Choice(decode.worker_id, decode_tokens=uncached)
