"""`python -m kvstore`: a store of KV blocks that several workers share."""

from kvstore.redis_directory import RedisDirectory
from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from pdmesh.config import parse
from pdmesh.server import run
from pdmesh.telemetry import configure_logging


def main() -> None:
    config = parse(StoreConfig, prog="python -m kvstore", description="Keeps KV blocks for all workers of a cluster.")
    service = config.service
    configure_logging(service.log_level, "kvstore")
    run(
        lambda: StoreService(config, RedisDirectory(service.redis_url, service.cluster)),
        drain_s=service.drain_s,
    )


if __name__ == "__main__":
    main()
