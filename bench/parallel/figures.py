"""What is made of the times and sizes: medians, ratios, and the targets that they miss. No I/O."""

import statistics
from collections.abc import Mapping, Sequence

from bench.parallel.decode import Turns
from bench.parallel.footprint import Footprint
from bench.parallel.pipeline import STAGES, Times

# At two tensor-parallel ranks: times as many tokens/s as one, and as much memory for each.
MIN_SPEEDUP = 1.6
MAX_MEMORY_SHARE = 0.55
# Of a rank's weights and the largest file. What a step needs besides is in what it has, too.
MAX_LOADING_RATIO = 1.1
# Of Gloo's time for one hidden state.
MAX_SUM_RATIO = 0.5
# Of the ideal time, at the most micro-batches.
MAX_PIPELINE_RATIO = 1.1
_FLOAT_BYTES = 4
_TARGET_TP = 2

Figures = dict[str, float]


def decode_figures(turns: Mapping[int, Turns]) -> dict[int, Figures]:
    """By number of running requests: tokens/s, `speedup` of the group over one rank, and that of ranks apart.

    Ranks apart have each a part of a model: the step that takes them as long is a whole one.
    """
    found = {}
    for batch, turn in turns.items():
        alone, together, apart = map(statistics.median, (turn.alone, turn.together, turn.apart))
        found[batch] = {
            "alone_tokens_per_s": batch / alone,
            "together_tokens_per_s": batch / together,
            "apart_tokens_per_s": batch / apart,
            "speedup": alone / together,
            "limit": alone / apart,
            "share_of_limit": apart / together,
        }
    return found


def memory_figures(footprints: Mapping[int, Footprint]) -> dict[int, Figures]:
    """By degree, of the rank that has most: MiB, and shares of what one rank has. Degree 1 must be among them.

    `loading_ratio` is the most that a rank had until it served beside its weights and the largest file.
    """
    whole = footprints[1].ranks[0]
    found = {}
    for tp, footprint in footprints.items():
        ranks = footprint.ranks
        most = {name: max(getattr(rank, name) for rank in ranks) for name in ("weights", "kv", "share", "own")}
        found[tp] = {
            **{f"{name}_mib": num_bytes / 2**20 for name, num_bytes in most.items()},
            "said_share": max(rank.weights + rank.kv for rank in ranks) / (whole.weights + whole.kv),
            "pss_share": most["share"] / whole.share,
            "own_share": most["own"] / whole.own,
            "loading_mib": max(rank.loading for rank in ranks) / 2**20,
            "loading_ratio": max(rank.loading / (rank.weights + footprint.file) for rank in ranks),
        }
    return found


def sum_figures(times: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[int, Figures]:
    """By number of values. A GiB/s is of the values that one rank has."""
    found = {}
    for size in times["ours"]:
        ours, gloo = (statistics.median(times[name][size]) for name in ("ours", "gloo"))
        gib = size * _FLOAT_BYTES / 2**30
        found[size] = {
            "ours_us": 1e6 * ours,
            "gloo_us": 1e6 * gloo,
            "ours_gib_per_s": gib / ours,
            "gloo_gib_per_s": gib / gloo,
            "ratio": ours / gloo,
        }
    return found


def pipeline_figures(times: Mapping[int, Times]) -> dict[int, Figures]:
    """By number of micro-batches, of one prompt; see pipeline.py for what is ideal."""
    found = {}
    for parts, measured in times.items():
        alone, apart, pipeline = map(statistics.median, (measured.alone, measured.apart, measured.pipeline))
        ideal = apart * (STAGES + parts - 1) / parts
        found[parts] = {
            "alone_ms": 1e3 * alone,
            "apart_ms": 1e3 * apart,
            "pipeline_ms": 1e3 * pipeline,
            "ideal_ms": 1e3 * ideal,
            "ratio": pipeline / ideal,
        }
    return found


def decode_misses(tp: int, figures: Mapping[int, Figures]) -> list[str]:
    """For a person."""
    return [
        f"decode at TP {tp}, {batch} requests: {found['speedup']:.2f} times one rank's speed, less than {MIN_SPEEDUP}; "
        f"ranks that never talk come to {found['limit']:.2f} here"
        for batch, found in figures.items()
        if tp == _TARGET_TP and found["speedup"] < MIN_SPEEDUP
    ]


def memory_misses(figures: Mapping[int, Figures]) -> list[str]:
    found = figures[_TARGET_TP]
    shares = {"weights and KV, as they say": "said_share", "all that is its own": "own_share"}
    misses = [
        f"a rank of {_TARGET_TP} has {found[name]:.2f} of one rank's memory ({what}), more than {MAX_MEMORY_SHARE}"
        for what, name in shares.items()
        if found[name] > MAX_MEMORY_SHARE
    ]
    misses += [
        f"until it serves, a rank of {tp} takes {one['loading_ratio']:.2f} of its weights and one file, more than "
        f"{MAX_LOADING_RATIO}"
        for tp, one in figures.items()
        if one["loading_ratio"] > MAX_LOADING_RATIO
    ]
    return misses


def sum_misses(figures: Mapping[int, Figures]) -> list[str]:
    hidden_state = figures[min(figures)]
    if hidden_state["ratio"] <= MAX_SUM_RATIO:
        return []
    return [f"the sum of a hidden state takes {hidden_state['ratio']:.2f} of Gloo's time, more than {MAX_SUM_RATIO}"]


def pipeline_misses(prompt: int, figures: Mapping[int, Figures]) -> list[str]:
    parts = max(figures)
    if figures[parts]["ratio"] <= MAX_PIPELINE_RATIO:
        return []
    return [
        f"{prompt} tokens in {parts} micro-batches: {figures[parts]['ratio']:.2f} of the ideal time, "
        f"more than {MAX_PIPELINE_RATIO}"
    ]
