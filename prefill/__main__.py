"""`python -m prefill MODEL`: one prefill worker."""

from typing import TYPE_CHECKING

from pdmesh.config import parse
from pdmesh.telemetry import configure_logging
from prefill.config import PrefillConfig
from worker.ranks import run_worker

if TYPE_CHECKING:
    from engine.local_engine import LocalEngine
    from prefill.service import PrefillService


def main() -> None:
    config = parse(PrefillConfig, prog="python -m prefill", description="Computes prompts for decode workers.")
    service = config.worker.service
    configure_logging(service.log_level, "prefill")

    def make_service(engine: "LocalEngine") -> "PrefillService":
        from kvstore.redis_directory import RedisDirectory
        from prefill.service import PrefillService

        return PrefillService(config, engine, RedisDirectory(service.redis_url, service.cluster))

    run_worker(config.worker, "prefill", make_service, lend_kv=True)


if __name__ == "__main__":
    main()
