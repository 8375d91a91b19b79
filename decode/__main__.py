"""`python -m decode MODEL`: one decode worker."""

from decode.config import DecodeConfig
from decode.service import DecodeService
from engine.local_engine import LocalEngine
from kvstore.redis_directory import RedisDirectory
from pdmesh.config import parse
from pdmesh.server import run
from pdmesh.telemetry import configure_logging


def main() -> None:
    config = parse(
        DecodeConfig, prog="python -m decode", description="Generates tokens; asks prefill workers for prompts."
    )
    service = config.worker.service
    configure_logging(service.log_level, "decode")
    run(
        lambda: DecodeService(
            config, LocalEngine(config.worker.engine), RedisDirectory(service.redis_url, service.cluster)
        ),
        drain_s=service.drain_s,
    )


if __name__ == "__main__":
    main()
