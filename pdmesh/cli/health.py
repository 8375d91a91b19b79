"""`pdmesh health`: exit code 0 where a server serves, 1 where it does not; for containers and scripts."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from pdmesh.channels import ChannelPool
from pdmesh.config import option, parse
from pdmesh.health import is_serving


@dataclass(frozen=True, slots=True)
class HealthConfig:
    address: str = option("any server of pdmesh, host:port", default="127.0.0.1:50051")
    timeout_s: float = option("seconds to wait for its answer", default=5.0)


def main(argv: Sequence[str]) -> int:
    config = parse(HealthConfig, argv, prog="pdmesh health", description="Asks a server whether it serves.")
    serving = asyncio.run(_ask(config))
    print("serving" if serving else "not serving")
    return 0 if serving else 1


async def _ask(config: HealthConfig) -> bool:
    async with contextlib.aclosing(ChannelPool()) as channels:
        return await is_serving(channels.get(config.address), timeout_s=config.timeout_s)
