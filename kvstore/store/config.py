"""What a store is told."""

from dataclasses import dataclass

from kvstore.tiers.config import TierConfig
from kvstore.transfer.transports import TRANSPORTS
from pdmesh.config import ServiceConfig, option
from pdmesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Raises ConfigError for a store without room, or transports that nobody knows."""

    service: ServiceConfig
    tiers: TierConfig
    store_id: str | None = option("name of this store, unique in the cluster; default: drawn", default=None)
    transports: str = option("transports to move KV on, best first", default=",".join(TRANSPORTS))

    def __post_init__(self) -> None:
        if not self.tiers.kv_host_gib:
            raise ConfigError("a store keeps KV in host memory: give --kv-host-gib, 4 for instance")
        unknown = [name for name in self.transport_names if name not in TRANSPORTS]
        if unknown or not self.transport_names:
            raise ConfigError(f"--transports is {self.transports!r}: name some of {', '.join(TRANSPORTS)}")

    @property
    def transport_names(self) -> list[str]:
        return [name.strip() for name in self.transports.split(",") if name.strip()]
