"""The arithmetic of choosing tokens: the seam between the sampler, which knows requests, and the ways to compute.

TorchSampling     plain torch, on any device: what every other way is compared with
CpuSampling       C++ kernels, on a CPU

Random choices take the Gumbel-max form: of the candidates, the token with the greatest logit / temperature + noise,
which picks each with its softmax probability. The noise of (request, output index i, token v) is a pure function of
(seed, completion_index, i, v), so a request goes on with the same tokens on any worker and in any batch. Workers'
logits differ by rounding, perhaps by 1e-6; here such a difference changes a token with a probability of about 1e-6,
for two scores must come that close. Inverting the cumulative distribution over sorted probabilities would not have
that property: where two neighbours in the order swap places, every draw that falls between them changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pdmesh.errors import InternalError
from pdmesh.types import TokenLogprob

# Gumbel noise over uniforms in steps of 2^-32 lies within (-3.2, 22.9): a token this far below the likeliest one is
# never chosen, so no noise need be drawn for it.
NEVER = 26.5


@dataclass(frozen=True, slots=True)
class Draws:
    """Tokens to be drawn, one from each of S rows of logits.

    A token's score is its logit's distance from the greatest, over the temperature: at most 0. Candidates are the
    tokens that score at least `floors`, are among the `top_ks` likeliest and, of these, among the fewest that have
    `top_ps` of their probability together. Tokens that tie with the last of those are candidates too: nothing depends
    on the order in which equal ones are sorted.

    Attributes:
        rows: [S] int64.
        temperatures: [S] float32, positive.
        floors: [S] float32, the logarithm of min_p; at least -NEVER.
        top_ks: [S] int64; 0: all.
        top_ps: [S] float64; 1: all.
        keys: [S] int64, of the noise; see engine/counter_rng.py.
        counters: [S] int64, of the noise of token 0; that of token v is v more.
    """

    rows: npt.NDArray[np.int64]
    temperatures: npt.NDArray[np.float32]
    floors: npt.NDArray[np.float32]
    top_ks: npt.NDArray[np.int64]
    top_ps: npt.NDArray[np.float64]
    keys: npt.NDArray[np.int64]
    counters: npt.NDArray[np.int64]


class SamplingOps(Protocol):
    """Over `logits` [R, vocab] float32, each row contiguous, which stay as they are. R may not be 0."""

    def likeliest(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        """[R], the first of the likeliest tokens of each row. Raises InternalError where logits are not finite."""
        ...

    def draw(self, logits: torch.Tensor, draws: Draws) -> npt.NDArray[np.int64]:
        """[S] token ids. The rows must have passed `likeliest`."""
        ...

    def logprobs(self, logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
        """Log-probabilities of one token for each row, and of the row's `num_top` likeliest."""
        ...


def not_finite() -> InternalError:
    """What `likeliest` raises."""
    return InternalError("the model's logits are not finite: its weights or its KV cache are damaged")
