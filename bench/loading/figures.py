"""What the measured times come to, beside what they are compared with."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.loading.bandwidth import Bandwidth

# Ours may take so much of transformers' time from the files to the first token.
MAX_TIME_RATIO = 0.8
MIN_OFFLOAD_RATIO = 0.8

Run = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """Medians over turns.

    Attributes:
        load_s: Until the loader returns. Transformers maps the files, and reads them at the first token.
        first_token_s: From the files to the first token: all weights were read.
        ratio: Of our time to the first token to theirs.
        over_weights_bytes: What was in memory beyond the weights at the worst moment of loading.
    """

    load_s: float
    first_token_s: float
    their_load_s: float
    their_first_token_s: float
    ratio: float
    over_weights_bytes: float


@dataclass(frozen=True, slots=True)
class OffloadFigures:
    """Of decoding with some of the weights on disk.

    Attributes:
        bound_per_s: Of a step that takes as long as in memory, or as reading what waits if that takes longer.
    """

    tokens_per_s: float
    bound_per_s: float
    ratio: float
    resident_bytes: float


def load_figures(ours: Sequence[Run], theirs: Sequence[Run], weight_bytes: int) -> LoadFigures:
    """Of runs that were made in turns."""
    ratios = [our["first_token_s"] / their["first_token_s"] for our, their in zip(ours, theirs, strict=True)]
    return LoadFigures(
        load_s=_median(ours, "load_s"),
        first_token_s=_median(ours, "first_token_s"),
        their_load_s=_median(theirs, "load_s"),
        their_first_token_s=_median(theirs, "first_token_s"),
        ratio=statistics.median(ratios),
        over_weights_bytes=max(our["peak_bytes"] for our in ours) - weight_bytes,
    )


def offload_figures(
    offloaded: Sequence[Run], whole: Sequence[Run], waiting_bytes: int, bandwidth: Bandwidth
) -> OffloadFigures:
    """Args:
    waiting_bytes: That come in for each step.
    """
    fastest = max(bandwidth.cached, bandwidth.direct or 0.0)
    bound = 1 / max(_median(whole, "step_s"), waiting_bytes / fastest)
    speed = 1 / _median(offloaded, "step_s")
    return OffloadFigures(speed, bound, speed / bound, max(run["resident_bytes"] for run in offloaded))


def _median(runs: Sequence[Run], name: str) -> float:
    return statistics.median(run[name] for run in runs)
