"""How a command reaches a router."""

from dataclasses import dataclass

from pdmesh.config import option


@dataclass(frozen=True, slots=True)
class ConnectionConfig:
    address: str = option("the router, host:port", default="127.0.0.1:50051")


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """The parameters that a person sets by hand; the rest keep the router's defaults."""

    max_tokens: int = option("output tokens at most", default=256)
    temperature: float = option("0 is greedy", default=0.7)
    top_p: float = option("keep the likeliest tokens up to this probability", default=1.0)
    seed: int | None = option("makes a sampled answer repeatable; default: drawn", default=None)
