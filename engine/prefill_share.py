"""How many prompt tokens join a step in which requests decode.

A step of few rows waits for the weights to come from memory, so some prompt tokens more cost it little; a whole chunk
would make every decoding request wait many times as long for its next token. What a step costs is learned from the
steps themselves, as fixed_s + token_s * tokens, which holds well from a few rows to many, on CPUs and GPUs; then

- prompts get what makes a step at most `max_slowdown` times as long as its decodes alone would make it,
- or more, where otherwise all that is queued would not be computed within `max_wait_s`: then whoever waits loses more
  than those who decode, and the batch would shrink for lack of newcomers. But these keep a third of the time, for
  where more comes than can be computed, no share would shorten the queue.

Knows counts and durations that it is told, no clock.
"""

from dataclasses import dataclass

# Weight of a step in the estimate, relative to the one after it: the last fifty or so count.
_DECAY = 0.98
# A longer step than this many times the expected counts as that: the machine was busy with something else.
_MAX_SURPRISE = 3.0
# What the longest queue may come to make of a step.
_MAX_QUEUE_SLOWDOWN = 3.0
# Prompt tokens that join in any case, so that prompts never stand still.
_MIN_TOKENS = 16


@dataclass(frozen=True, slots=True)
class StepCost:
    """A step of n tokens takes `fixed_s + token_s * n` seconds; both are positive."""

    fixed_s: float
    token_s: float

    def of(self, num_tokens: float) -> float:
        return self.fixed_s + self.token_s * num_tokens


class StepCostEstimate:
    """The line through the steps seen, by least squares; the newest weigh most.

    Short steps weigh more than long ones, in proportion: it is relative errors that matter.
    """

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._tokens_squared = self._tokens_seconds = 0.0
        self._cost: StepCost | None = None

    @property
    def cost(self) -> StepCost | None:
        """None until steps of different sizes were seen."""
        return self._cost

    def record(self, num_tokens: int, duration_s: float) -> None:
        duration_s = max(duration_s, 1e-9)
        if self._cost is not None:
            duration_s = min(duration_s, _MAX_SURPRISE * self._cost.of(num_tokens))
        weight = 1.0 / num_tokens
        self._weight = self._weight * _DECAY + weight
        self._tokens = self._tokens * _DECAY + weight * num_tokens
        self._seconds = self._seconds * _DECAY + weight * duration_s
        self._tokens_squared = self._tokens_squared * _DECAY + weight * num_tokens**2
        self._tokens_seconds = self._tokens_seconds * _DECAY + weight * num_tokens * duration_s
        self._cost = self._fit()

    def _fit(self) -> StepCost | None:
        mean_tokens, mean_s = self._tokens / self._weight, self._seconds / self._weight
        variance = self._tokens_squared / self._weight - mean_tokens**2
        # Steps of one size say nothing about the cost of a token: what was learned of it before stays.
        if variance > 0.01 * mean_tokens**2:
            token_s = (self._tokens_seconds / self._weight - mean_tokens * mean_s) / variance
        elif self._cost is not None:
            token_s = self._cost.token_s
        else:
            return None
        # Noise must make neither part negative; a token costs at most what a step costs for each.
        token_s = min(max(token_s, 1e-3 * mean_s / mean_tokens), 0.999 * mean_s / mean_tokens)
        return StepCost(mean_s - token_s * mean_tokens, token_s)


class PrefillShare:
    """Decides how many prompt tokens join the decodes of a step, from what steps took.

    Args:
        max_slowdown: At least 1.
        max_wait_s: Time in which what is queued should be computed.
    """

    def __init__(self, *, max_slowdown: float, max_wait_s: float) -> None:
        self._max_slowdown = max_slowdown
        self._max_wait_s = max_wait_s
        self._estimate = StepCostEstimate()

    def record(self, num_tokens: int, duration_s: float) -> None:
        """Tells how long a step of so many tokens took."""
        self._estimate.record(num_tokens, duration_s)

    def token_s(self, num_tokens: int) -> float:
        """What a prompt token costs in a step of so many, in seconds; 0 until that is known."""
        cost = self._estimate.cost
        return cost.of(num_tokens) / num_tokens if cost is not None else 0.0

    def max_tokens(self, num_decodes: int, num_queued_tokens: int) -> int | None:
        """Prompt tokens for a step with `num_decodes` decodes; None: as many as fit.

        Args:
            num_queued_tokens: Prompt tokens that are to be computed in all.
        """
        cost = self._estimate.cost
        if not num_decodes or cost is None:
            return None
        decodes_s = cost.of(num_decodes)
        # Tokens that cost as much as the decodes do.
        num_equal = decodes_s / cost.token_s
        num_tokens = (self._max_slowdown - 1) * num_equal
        most = max(num_tokens, (_MAX_QUEUE_SLOWDOWN - 1) * num_equal)
        # In steps of n prompt tokens the queue is done after num_queued / n of them, each with its decodes.
        spare_s = self._max_wait_s - cost.token_s * num_queued_tokens
        in_time = num_queued_tokens * decodes_s / spare_s if spare_s > 0 else most
        return max(_MIN_TOKENS, int(min(max(num_tokens, in_time), most)))
