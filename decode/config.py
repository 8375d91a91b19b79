"""What a decode worker is told."""

from dataclasses import dataclass

from kvstore.transfer.transports import TRANSPORTS
from pdmesh.config import option
from pdmesh.errors import ConfigError
from worker.config import WorkerConfig


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    worker: WorkerConfig
    transports: str = option("transports to receive KV on, best first", default=",".join(TRANSPORTS))
    short_prefill_tokens: int = option("prompts with fewer tokens to compute are computed here", default=64)

    def __post_init__(self) -> None:
        unknown = [name for name in self.transport_names if name not in TRANSPORTS]
        if unknown or not self.transport_names:
            install = "; for nixl, pip install 'pdmesh[nixl]'" if "nixl" in unknown else ""
            raise ConfigError(f"--transports is {self.transports!r}: name some of {', '.join(TRANSPORTS)}{install}")

    @property
    def transport_names(self) -> list[str]:
        return [name.strip() for name in self.transports.split(",") if name.strip()]
