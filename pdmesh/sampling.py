"""How tokens are chosen: the parameters of a request, their defaults and their limits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from pdmesh.errors import InvalidRequestError
from pdmesh.v1 import common_pb2 as pb

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024

_EMPTY: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters with every default filled in; see common.proto for what each means.

    Construction checks nothing; `validate` does, before anything is allocated.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _EMPTY, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidRequestError naming the field, its value and its limit."""
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("seed", self.seed, 0, 2**64 - 1)
        _within("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        _within("n", self.n, 1, MAX_N)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _within(name, count, 0, MAX_LOGPROBS)
        _within("number of stop strings", len(self.stop), 0, MAX_STOP_STRINGS)
        _within("number of stop_token_ids", len(self.stop_token_ids), 0, MAX_STOP_TOKEN_IDS)
        _within("number of logit_bias entries", len(self.logit_bias), 0, MAX_LOGIT_BIAS)
        for text in self.stop:
            _within("length of a stop string in bytes", len(text.encode()), 1, MAX_STOP_STRING_BYTES)
        for token_id in self.stop_token_ids:
            _within("a stop token id", token_id, 0, vocab_size - 1)
        for token_id, bias in self.logit_bias.items():
            _within("a logit_bias token id", token_id, 0, vocab_size - 1)
            _within(f"logit_bias of token {token_id}", bias, -100.0, 100.0)

    @classmethod
    def from_pb(cls, message: pb.SamplingParams) -> "SamplingParams":
        """Fills in the default of every field that is unset."""
        values: dict[str, Any] = {}
        for f in fields(cls):
            descriptor = message.DESCRIPTOR.fields_by_name[f.name]
            if descriptor.has_presence and not message.HasField(f.name):  # type: ignore[arg-type]
                continue
            values[f.name] = getattr(message, f.name)
        values["stop"] = tuple(message.stop)
        values["stop_token_ids"] = tuple(message.stop_token_ids)
        values["logit_bias"] = MappingProxyType(dict(message.logit_bias))
        return cls(**values)

    def to_pb(self) -> pb.SamplingParams:
        """The message with every field set, so that peers of another version keep our defaults."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values["logit_bias"] = dict(self.logit_bias)
        return pb.SamplingParams(**values)


def _within(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    # NaN fails every comparison, so it is refused with the rest.
    if math.isfinite(value) and (low < value if low_open else low <= value) and value <= high:
        return
    bracket = "(" if low_open else "["
    raise InvalidRequestError(
        f"{name} is {value}: must lie in {bracket}{low}, {high}]",
        reason="INVALID_SAMPLING_PARAMS",
        stage="admission",
        details={"field": name, "value": str(value), "low": str(low), "high": str(high)},
    )
