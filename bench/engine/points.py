"""What is measured, and what is made of the measurements: points, medians, ratios, shares."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.engine.roofline import Limits, Work, decode_work, prefill_work
from engine.model_config import ModelConfig
from pdmesh.errors import ConfigError

DECODE_PROMPT = 128
DECODE_TOKENS = 64
# Short prompts are over in milliseconds: several are measured in one turn.
_MIN_PREFILL_TOKENS = 1024
OURS = "ours"


@dataclass(frozen=True, slots=True)
class Point:
    """`prefill_N`: time to the first token of one prompt of N tokens. `decode_bN`: N sequences that all decode."""

    kind: str
    size: int

    @property
    def name(self) -> str:
        return f"prefill_{self.size}" if self.kind == "prefill" else f"decode_b{self.size}"

    @property
    def max_len(self) -> int:
        """Tokens of a sequence, prompt and output."""
        return self.size + 1 if self.kind == "prefill" else DECODE_PROMPT + DECODE_TOKENS

    @property
    def num_sequences(self) -> int:
        return 1 if self.kind == "prefill" else self.size

    def request(self, seed: int) -> dict[str, int]:
        """As the protocol has it."""
        if self.kind == "prefill":
            return {"prefill": self.size, "prompts": max(1, _MIN_PREFILL_TOKENS // self.size), "seed": seed}
        return {"decode": self.size, "prompt": DECODE_PROMPT, "tokens": DECODE_TOKENS, "seed": seed}

    def work(self, config: ModelConfig, bytes_per_value: int) -> Work:
        """Of the prompt, or of a step half-way through the decoding of sequences that all began at once."""
        if self.kind == "prefill":
            return prefill_work(config, self.size, bytes_per_value)
        return decode_work(config, self.size, DECODE_PROMPT + DECODE_TOKENS / 2, bytes_per_value)


def parse_point(name: str) -> Point:
    """Raises ConfigError for a name that is none."""
    for kind, prefix in (("prefill", "prefill_"), ("decode", "decode_b")):
        size = name.removeprefix(prefix)
        if name.startswith(prefix) and size.isdecimal() and int(size) > 0:
            return Point(kind, int(size))
    raise ConfigError(f"there is no point {name}: give prefill_N or decode_bN, e.g. prefill_512 or decode_b8")


def compare(rounds: Mapping[str, Sequence[float]], work: Work, limits: Limits) -> dict[str, Any]:
    """What a report says of one point.

    Args:
        rounds: Tokens/s of each engine in each round; OURS is one of them.
        limits: Of the machine while this point was measured.
    """
    medians = {name: statistics.median(figures) for name, figures in rounds.items()}
    ours = medians.pop(OURS)
    limit = work.tokens_per_s(limits)
    return {
        "ours": ours,
        "peers": medians,
        "ratio_to_best": ours / max(medians.values()) if medians else None,
        "share_of_limit": ours / limit,
        "limit": limit,
        "spread": {name: spread(figures) for name, figures in rounds.items()},
        "rounds": {name: list(figures) for name, figures in rounds.items()},
    }


def spread(figures: Sequence[float]) -> float:
    """Largest less smallest, as a share of the median."""
    return (max(figures) - min(figures)) / statistics.median(figures)
