"""`python -m router MODEL`: one router."""

from kvstore.redis_directory import RedisDirectory
from pdmesh.config import parse
from pdmesh.server import run
from pdmesh.telemetry import configure_logging
from router.config import RouterConfig
from router.service import RouterService


def main() -> None:
    config = parse(RouterConfig, prog="python -m router", description="Takes requests and gives them to workers.")
    service = config.service
    configure_logging(service.log_level, "router")
    run(
        lambda: RouterService(config, RedisDirectory(service.redis_url, service.cluster)),
        drain_s=service.drain_s,
    )


if __name__ == "__main__":
    main()
