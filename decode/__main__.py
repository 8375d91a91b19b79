"""`python -m decode MODEL`: one decode worker."""

from typing import TYPE_CHECKING

from decode.config import DecodeConfig
from pdmesh.config import parse
from pdmesh.telemetry import configure_logging
from worker.ranks import run_worker

if TYPE_CHECKING:
    from decode.service import DecodeService
    from engine.local_engine import LocalEngine


def main() -> None:
    config = parse(
        DecodeConfig, prog="python -m decode", description="Generates tokens; asks prefill workers for prompts."
    )
    service = config.worker.service
    configure_logging(service.log_level, "decode")

    def make_service(engine: "LocalEngine") -> "DecodeService":
        from decode.service import DecodeService
        from kvstore.redis_directory import RedisDirectory

        return DecodeService(config, engine, RedisDirectory(service.redis_url, service.cluster))

    run_worker(config.worker, "decode", make_service, lend_kv=False, transports=config.transport_names)


if __name__ == "__main__":
    main()
