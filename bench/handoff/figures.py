"""What is made of the times of one transport's rounds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# What the hand-off may cost: of the time to the first token, and until the second one in decode steps.
MAX_TTFT_RATIO = 1.05
MAX_SECOND_TOKEN_STEPS = 2.0
# Before a decode step can be told: the first token comes from prefill, the second waits for the KV.
MIN_OUTPUT_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it.

    Attributes:
        token_s: Arrival of each token since the request was sent; at least MIN_OUTPUT_TOKENS.
        kv_bytes: That travelled.
        prefill_s: From the start of computing to the first token, on the prefill worker.
        transfer_s: From the grant to the last byte verified; overlaps `prefill_s`.
    """

    token_s: tuple[float, ...]
    kv_bytes: int
    prefill_s: float
    transfer_s: float

    @property
    def step_s(self) -> float:
        """A decode step: the median time between tokens from the second one on."""
        return statistics.median(later - earlier for earlier, later in pairwise(self.token_s[1:]))

    @property
    def second_token_s(self) -> float:
        """From the first token to the second."""
        return self.token_s[1] - self.token_s[0]

    @property
    def second_token_steps(self) -> float:
        return self.second_token_s / self.step_s


@dataclass(frozen=True, slots=True)
class Round:
    """Two prompts of the same length: `alone_s` to the first token of the prefill worker by itself, and the mesh's."""

    alone_s: float
    mesh: Answer

    @property
    def ttft_ratio(self) -> float:
        return self.mesh.token_s[0] / self.alone_s


def summarise(rounds: Sequence[Round]) -> dict[str, float]:
    """Medians, and 90th percentiles where the name says so. `ttft_ratio` is that of the medians."""
    alone = [one.alone_s for one in rounds]
    answers = [one.mesh for one in rounds]
    mesh = [answer.token_s[0] for answer in answers]
    steps = [answer.second_token_steps for answer in answers]
    return {
        "alone_ttft_ms": 1e3 * statistics.median(alone),
        "alone_ttft_p90_ms": 1e3 * p90(alone),
        "mesh_ttft_ms": 1e3 * statistics.median(mesh),
        "mesh_ttft_p90_ms": 1e3 * p90(mesh),
        "ttft_ratio": statistics.median(mesh) / statistics.median(alone),
        "ttft_ratio_p90": p90([one.ttft_ratio for one in rounds]),
        "decode_step_ms": 1e3 * statistics.median(answer.step_s for answer in answers),
        "second_token_ms": 1e3 * statistics.median(answer.second_token_s for answer in answers),
        "second_token_steps": statistics.median(steps),
        "second_token_steps_p90": p90(steps),
        "prefill_ms": 1e3 * statistics.median(answer.prefill_s for answer in answers),
        "transfer_ms": 1e3 * statistics.median(answer.transfer_s for answer in answers),
        "kv_mib": statistics.median(answer.kv_bytes for answer in answers) / (1 << 20),
    }


def misses(figures: dict[str, float]) -> list[str]:
    """The targets that these figures miss, for a person."""
    found = []
    if figures["ttft_ratio"] > MAX_TTFT_RATIO:
        found.append(f"TTFT is {figures['ttft_ratio']:.3f} of the prefill worker's own, more than {MAX_TTFT_RATIO}")
    if figures["second_token_steps"] > MAX_SECOND_TOKEN_STEPS:
        found.append(
            f"the second token comes {figures['second_token_steps']:.2f} decode steps after the first, "
            f"later than {MAX_SECOND_TOKEN_STEPS:g}"
        )
    return found


def p90(values: Sequence[float]) -> float:
    """The smallest value that nine in ten do not exceed."""
    return sorted(values)[-(-9 * len(values) // 10) - 1]
