"""A decode worker as a process: wires engine, directory, receivers and servicer, and owns their lives."""

from decode.config import DecodeConfig
from decode.handoff import Handoff
from decode.servicer import DecodeServicer
from decode.worker import DecodeWorker
from engine.api import Engine
from kvstore.directory import Directory
from kvstore.transfer.receiver import ReceiverHub
from pdmesh.channels import ChannelPool
from pdmesh.types import Role
from pdmesh.v1 import decode_pb2_grpc
from worker.host import WorkerHost
from worker.memory import EngineMemory


class DecodeService:
    """A `pdmesh.server.Service`. Takes over `engine` and `directory`: closing it closes them."""

    def __init__(self, config: DecodeConfig, engine: Engine, directory: Directory) -> None:
        self.host = WorkerHost(config.worker, Role.DECODE, engine, directory)
        self._channels = ChannelPool()
        listen = config.worker.service
        self._hub = ReceiverHub(
            EngineMemory(engine),
            config.transport_names,
            self.host.server,
            listen.host,
            listen.advertised_host,
            self.host.journal,
        )
        self.host.num_tickets = lambda: self._hub.num_open_tickets
        self._handoff = Handoff(self.host, engine, self._hub, self._channels)
        worker = DecodeWorker(engine, self._handoff, config.short_prefill_tokens)
        servicer = DecodeServicer(self.host, worker)
        self.host.server.add(decode_pb2_grpc.add_DecodeServicer_to_server, servicer, "pdmesh.v1.Decode")

    async def start(self) -> None:
        await self._hub.start()
        await self.host.start()

    async def drain_asked(self) -> None:
        await self.host.leaving_asked()

    async def drain(self) -> None:
        await self.host.drain()

    async def close(self) -> None:
        await self.host.close()
        await self._handoff.aclose()
        await self._hub.aclose()
        await self._channels.aclose()
