"""What a router is told."""

from dataclasses import dataclass, field

from pdmesh.config import ServiceConfig, option
from pdmesh.errors import ConfigError
from router.policy import Weights

_MAX_TEXT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Raises ConfigError for values that make no sense."""

    model: str = option("the workers' model, for its tokenizer: model directory, .gguf file or Hub id", positional=True)
    service: ServiceConfig = field(default_factory=ServiceConfig)
    served_model_name: str | None = option("name by which clients ask for it; default: the model's own", default=None)
    max_text_bytes: int = option("bytes of text in one request, all its messages together", default=1 << 20)
    max_messages: int = option("chat messages in one request", default=1024)
    max_active_requests: int = option("requests held at once; more are refused", default=256)
    short_prefill_tokens: int = option(
        "prompts with at most this many uncached tokens are computed by the decode worker itself", default=64
    )
    queue_weight: float = option("cost of a token queued at a worker, in uncached prompt tokens", default=1.0)
    request_weight: float = option("cost of a request that a worker has, in uncached prompt tokens", default=16.0)
    pressure_weight: float = option("cost of a worker's KV cache being full; see router/policy.py", default=1.0)

    def __post_init__(self) -> None:
        for name in ("max_text_bytes", "max_messages", "max_active_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 1")
        if self.max_text_bytes > _MAX_TEXT_BYTES:
            raise ConfigError(f"max_text_bytes is {self.max_text_bytes}: must be at most {_MAX_TEXT_BYTES}")
        for name in ("short_prefill_tokens", "queue_weight", "request_weight", "pressure_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: must not be negative")

    @property
    def weights(self) -> Weights:
        return Weights(self.queue_weight, self.request_weight, self.pressure_weight)
