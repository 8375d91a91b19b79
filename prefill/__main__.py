"""`python -m prefill MODEL`: one prefill worker."""

from engine.local_engine import LocalEngine
from kvstore.redis_directory import RedisDirectory
from pdmesh.config import parse
from pdmesh.server import run
from pdmesh.telemetry import configure_logging
from prefill.config import PrefillConfig
from prefill.service import PrefillService


def main() -> None:
    config = parse(PrefillConfig, prog="python -m prefill", description="Computes prompts for decode workers.")
    service = config.worker.service
    configure_logging(service.log_level, "prefill")
    run(
        lambda: PrefillService(
            config,
            LocalEngine(config.worker.engine, lend_kv=True),
            RedisDirectory(service.redis_url, service.cluster),
        ),
        drain_s=service.drain_s,
    )


if __name__ == "__main__":
    main()
