"""A prefill worker as a process: wires engine, directory, exchange and servicer, and owns their lives."""

from engine.api import Engine
from kvstore.directory import Directory
from kvstore.transfer.transports import TRANSPORTS
from pdmesh.types import Role
from pdmesh.v1 import prefill_pb2_grpc
from prefill.config import PrefillConfig
from prefill.servicer import PrefillServicer
from prefill.worker import PrefillWorker
from worker.exchange import WorkerExchange
from worker.host import WorkerHost


class PrefillService:
    """A `pdmesh.server.Service`. Takes over `engine` and `directory`: closing it closes them."""

    def __init__(self, config: PrefillConfig, engine: Engine, directory: Directory) -> None:
        self.host = WorkerHost(config.worker, Role.PREFILL, engine, directory)
        self._exchange = WorkerExchange(self.host, engine, directory, config.worker.service, TRANSPORTS)
        worker = PrefillWorker(engine, self._exchange.sending, self._exchange.prefixes, self._exchange.feed)
        servicer = PrefillServicer(self.host, worker)
        self.host.server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, servicer, "pdmesh.v1.Prefill")

    async def start(self) -> None:
        await self._exchange.start()
        await self.host.start()
        self._exchange.feed.start()

    async def drain_asked(self) -> None:
        await self.host.leaving_asked()

    async def drain(self) -> None:
        await self.host.drain()

    async def close(self) -> None:
        await self.host.close()
        await self._exchange.aclose()
