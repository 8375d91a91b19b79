"""A decode worker as a process: wires engine, directory, exchange and servicer, and owns their lives."""

from decode.config import DecodeConfig
from decode.handoff import Handoff
from decode.servicer import DecodeServicer
from decode.worker import DecodeWorker
from engine.api import Engine
from kvstore.directory import Directory
from pdmesh.types import Role
from pdmesh.v1 import decode_pb2_grpc
from worker.exchange import WorkerExchange
from worker.host import WorkerHost


class DecodeService:
    """A `pdmesh.server.Service`. Takes over `engine` and `directory`: closing it closes them."""

    def __init__(self, config: DecodeConfig, engine: Engine, directory: Directory) -> None:
        self.host = WorkerHost(config.worker, Role.DECODE, engine, directory)
        self._exchange = WorkerExchange(self.host, engine, directory, config.worker.service, config.transport_names)
        self._handoff = Handoff(self.host, engine, self._exchange.receiving, self._exchange.channels)
        worker = DecodeWorker(engine, self._handoff, self._exchange.prefixes, config.short_prefill_tokens)
        servicer = DecodeServicer(self.host, worker)
        self.host.server.add(decode_pb2_grpc.add_DecodeServicer_to_server, servicer, "pdmesh.v1.Decode")

    async def start(self) -> None:
        await self._exchange.start()
        await self.host.start()

    async def drain_asked(self) -> None:
        await self.host.leaving_asked()

    async def drain(self) -> None:
        await self.host.drain()

    async def close(self) -> None:
        await self.host.close()
        await self._handoff.aclose()
        await self._exchange.aclose()
