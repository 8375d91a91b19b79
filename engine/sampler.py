"""Chooses the next token of each request from its logits.

What a request asks for is laid down in arrays by its seat when it gets that, so that a step's work in Python does not
grow with the batch, except for requests with penalties, biases or logprobs.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.counter_rng import stream_key
from engine.logit_edits import LogitEdits
from engine.request import Request
from engine.sampling_ops import NEVER, Draws, SamplingOps
from pdmesh.types import TokenLogprob


class Sampler:
    """The sampling parameters of the seats' requests, and how their tokens come about. Not thread-safe.

    Nothing need be told when a request ends: its seat's next one is written over it.

    Args:
        ops: Does the arithmetic.
        device: Where the logits lie.
    """

    def __init__(self, ops: SamplingOps, *, num_seats: int, vocab_size: int, device: torch.device) -> None:
        self._ops = ops
        self._vocab_size = vocab_size
        self._device = device
        # 0 for greedy ones.
        self._temperatures = np.zeros(num_seats, np.float32)
        self._top_ks = np.zeros(num_seats, np.int64)
        self._top_ps = np.ones(num_seats, np.float64)
        self._floors = np.full(num_seats, -NEVER, np.float32)
        self._keys = np.zeros(num_seats, np.int64)
        self._num_prompt_tokens = np.zeros(num_seats, np.int64)
        self._edits: list[LogitEdits | None] = [None] * num_seats
        self._is_edited = np.zeros(num_seats, np.bool_)
        self._wants_logprobs = np.zeros(num_seats, np.bool_)

    def seat(self, request: Request) -> None:
        """A request has taken its seat, or takes it anew."""
        sampling, seat = request.sampling, request.seat
        # Below 1e-6 nothing but the likeliest token is left, and float32 would come to divide by 0.
        self._temperatures[seat] = 0.0 if sampling.greedy else max(sampling.temperature, 1e-6)
        self._top_ks[seat] = sampling.top_k
        self._top_ps[seat] = sampling.top_p
        self._floors[seat] = max(math.log(sampling.min_p), -NEVER) if sampling.min_p else -NEVER
        self._keys[seat] = stream_key(sampling.seed, request.source.completion_index)
        self._num_prompt_tokens[seat] = request.num_prompt_tokens
        edits = LogitEdits(sampling, self._vocab_size, self._device) if LogitEdits.needed(sampling) else None
        self._edits[seat] = edits
        self._is_edited[seat] = edits is not None
        self._wants_logprobs[seat] = sampling.logprobs is not None

    def sample(
        self, logits: torch.Tensor, requests: Sequence[Request], seats: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """The next token of each request, [R].

        Args:
            logits: [R, vocab] float32, one row for each request; edited where its request asks for that.
            seats: [R], of the requests.

        Raises InternalError where logits are not finite.
        """
        for row in np.flatnonzero(self._is_edited[seats]).tolist():
            edits, request = self._edits[seats[row]], requests[row]
            assert edits is not None
            edits.apply(logits[row], request.token_ids, request.num_prompt_tokens)
        token_ids = self._ops.likeliest(logits)
        rows = np.flatnonzero(self._temperatures[seats])
        if len(rows):
            token_ids[rows] = self._ops.draw(logits, self._draws(rows, requests, seats[rows]))
        return token_ids

    def logprobs(
        self,
        logits: torch.Tensor,
        requests: Sequence[Request],
        seats: npt.NDArray[np.int64],
        token_ids: npt.NDArray[np.int64],
    ) -> dict[Request, TokenLogprob]:
        """Those of the tokens that `sample` chose from the same logits, for the requests that want them."""
        found = {}
        for row in np.flatnonzero(self._wants_logprobs[seats]).tolist():
            request = requests[row]
            num_top = request.sampling.logprobs or 0
            [found[request]] = self._ops.logprobs(logits[row : row + 1], [int(token_ids[row])], num_top)
        return found

    def judge(self, logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
        """Log-probabilities of given tokens, one for each row of `logits` [N, vocab]; see SamplingOps.logprobs."""
        return self._ops.logprobs(logits, token_ids, num_top)

    def _draws(self, rows: npt.NDArray[np.int64], requests: Sequence[Request], seats: npt.NDArray[np.int64]) -> Draws:
        num_tokens = np.fromiter((len(requests[row].token_ids) for row in rows.tolist()), np.int64, len(rows))
        return Draws(
            rows=rows,
            temperatures=self._temperatures[seats],
            top_ks=self._top_ks[seats],
            top_ps=self._top_ps[seats],
            floors=self._floors[seats],
            keys=self._keys[seats],
            counters=(num_tokens - self._num_prompt_tokens[seats]) << 32,
        )
