"""What every worker is told, whatever its role."""

from dataclasses import dataclass, field

from engine.config import EngineConfig
from kvstore.tiers.config import TierConfig
from pdmesh.config import ServiceConfig, option
from pdmesh.errors import ConfigError
from pdmesh.ranks.config import GroupConfig


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    service: ServiceConfig
    engine: EngineConfig
    tiers: TierConfig
    worker_id: str | None = option("name of this worker, unique in the cluster; default: drawn", default=None)
    max_requests: int = option("requests held at once, queued ones included; more are refused", default=256)
    group: GroupConfig = field(default_factory=GroupConfig)

    def __post_init__(self) -> None:
        if self.group.nnodes > 1 and self.tiers.kv_host_gib:
            raise ConfigError(
                "--kv-host-gib keeps whole KV blocks, and with --nnodes their parts are on several machines: leave it "
                "out"
            )
