"""Medians, ratios, and whether they are as wanted. No I/O."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Seen:
    """What one way came to. TTFT in seconds; `unproven` were asked for again and came from elsewhere: not counted."""

    computed_s: list[float] = field(default_factory=list)
    brought_s: list[float] = field(default_factory=list)
    num_unproven: int = 0


def p90(values: Sequence[float]) -> float:
    """Nearest rank: a value that was seen."""
    ranked = sorted(values)
    return ranked[-(-9 * len(ranked) // 10) - 1]


def figures(seen: Seen, wanted: float) -> dict[str, Any]:
    """For the table and the file; milliseconds."""
    computed, brought = statistics.median(seen.computed_s), statistics.median(seen.brought_s)
    return {
        "computed_ms": {"p50": 1e3 * computed, "p90": 1e3 * p90(seen.computed_s), "num": len(seen.computed_s)},
        "brought_ms": {"p50": 1e3 * brought, "p90": 1e3 * p90(seen.brought_s), "num": len(seen.brought_s)},
        "num_unproven": seen.num_unproven,
        "ratio": brought / computed,
        "wanted": wanted,
        "met": brought / computed <= wanted,
    }
