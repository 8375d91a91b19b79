"""Is it cheaper to bring a prompt's KV from somewhere, or to compute it? Bytes, link speed and compute speed."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# What an origin is taken for until it was measured: seconds before the first byte, then bytes a second.
HOST, DISK, REMOTE = "host", "disk", "remote"
_FIRST_GUESS = {HOST: (0.0005, 4e9), DISK: (0.002, 8e8), REMOTE: (0.005, 5e8)}
# Seconds for a prompt token until prompts were computed here. Much: what is brought needlessly once does no harm.
_COMPUTE_GUESS_S = 0.002
# Share of the newest measurement in what is believed.
_NEWEST = 0.3
# Smaller ones say more of the machine's mood than of its speed.
_MIN_BYTES = 1 << 20
# For how long nothing is brought from where it failed: one prompt loses time there, not each that follows.
SHUN_S = 10.0


class Speeds:
    """What was measured of loading and computing here. Owned by one event loop.

    Args:
        prefill_token_s: Seconds that a prompt token takes to compute; 0 where that is not known yet.
        clock: Seconds, monotonic.
    """

    def __init__(self, prefill_token_s: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._prefill_token_s = prefill_token_s
        self._clock = clock
        self._bytes_per_s: dict[str, float] = {}
        self._shunned_until: dict[str, float] = {}

    def note_load(self, origin: str, num_bytes: int, duration_s: float) -> None:
        """So much came from `origin`, one of HOST, DISK or a worker's id."""
        if num_bytes >= _MIN_BYTES:
            delay_s = _FIRST_GUESS.get(origin, _FIRST_GUESS[REMOTE])[0]
            measured = num_bytes / max(duration_s - delay_s, 1e-6)
            before = self._bytes_per_s.get(origin)
            self._bytes_per_s[origin] = measured if before is None else before + _NEWEST * (measured - before)

    def note_failure(self, origin: str) -> None:
        """Nothing could be had from `origin`, or not in time."""
        self._shunned_until[origin] = self._clock() + SHUN_S

    def load_s(self, origin: str, num_bytes: int) -> float:
        """How long so many bytes from `origin` should take; infinite for a while after it failed."""
        if not num_bytes:
            return 0.0
        if self._clock() < self._shunned_until.get(origin, -math.inf):
            return math.inf
        delay_s, guess = _FIRST_GUESS.get(origin, _FIRST_GUESS[REMOTE])
        return delay_s + num_bytes / self._bytes_per_s.get(origin, guess)

    def compute_s(self, num_tokens: int) -> float:
        """How long so many prompt tokens should take."""
        return num_tokens * (self._prefill_token_s() or _COMPUTE_GUESS_S)


@dataclass(frozen=True, slots=True)
class Plan:
    """From where the blocks after those in the cache come; the rest of the prompt is computed.

    Attributes:
        num_own: Blocks to load from this worker's own tiers.
        source: Place, in the list of sources, of whom to fetch from after that; None: nobody.
        seconds: What all of it should take.
    """

    num_own: int
    source: int | None
    seconds: float


def cheapest(
    speeds: Speeds,
    *,
    num_missing: int,
    own: Iterable[str],
    sources: Iterable[tuple[str, int]],
    block_bytes: int,
    block_size: int,
) -> Plan:
    """The plan that should take least; for equal times, the one that computes.

    Args:
        num_missing: Full blocks of the prompt that are not in the cache.
        own: Tier of each of the missing blocks that this worker's tiers hold, from the first on: HOST or DISK.
        sources: Id of each other holder, and how many of the missing blocks it has, from the first on.
        block_bytes: Bytes of a block.
        block_size: Tokens of a block.
    """
    tiers = list(own)[:num_missing]
    own_s = sum(speeds.load_s(tier, tiers.count(tier) * block_bytes) for tier in set(tiers))

    def total_s(num_own: int, source_s: float, num_brought: int) -> float:
        loading_s = own_s if num_own else 0.0
        return loading_s + source_s + speeds.compute_s((num_missing - num_brought) * block_size)

    plans = [Plan(0, None, total_s(0, 0.0, 0))]
    if tiers:
        plans.append(Plan(len(tiers), None, total_s(len(tiers), 0.0, len(tiers))))
    for place, (origin, held) in enumerate(sources):
        held = min(held, num_missing)
        for num_own in {0, len(tiers)}:
            if held > num_own:
                source_s = speeds.load_s(origin, (held - num_own) * block_bytes)
                plans.append(Plan(num_own, place, total_s(num_own, source_s, held)))
    return min(plans, key=lambda plan: plan.seconds)
