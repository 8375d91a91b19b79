"""`pdmesh drain WORKER`: the worker finishes what it has, takes nothing new, and leaves."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdmesh.cli.connection import ConnectionConfig
from pdmesh.client import Client
from pdmesh.config import option, parse


@dataclass(frozen=True, slots=True)
class DrainConfig:
    connection: ConnectionConfig
    worker: str = option("the worker's id, as `pdmesh status` shows it", positional=True)


def main(argv: Sequence[str]) -> int:
    description = "Lets a worker finish what it has and leave."
    config = parse(DrainConfig, argv, prog="pdmesh drain", description=description)
    with Client(config.connection.address) as client:
        client.drain(config.worker)
    print(f"{config.worker} takes no new requests, and leaves when it has finished those that it has")
    return 0
