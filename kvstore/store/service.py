"""A store as a process: wires tiers, transports, directory and servicers, and owns their lives."""

import asyncio
import contextlib
import logging
import secrets
import time
from dataclasses import replace

from prometheus_client import CollectorRegistry, ProcessCollector

from kvstore.announcer import Announcer
from kvstore.directory import Directory
from kvstore.exchange.servicer import SERVICE as FETCH_SERVICE
from kvstore.exchange.servicer import FetchServicer
from kvstore.store.blocks import StoreBlocks
from kvstore.store.config import StoreConfig
from kvstore.store.servicer import PutServicer
from kvstore.tiers.base import TierChange
from kvstore.tiers.metrics import TierCollector
from kvstore.tiers.stack import with_tiers
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.senders import KVSenders
from pdmesh.channels import ChannelPool
from pdmesh.metrics_server import MetricsServer
from pdmesh.server import GrpcServer
from pdmesh.types import Load, Role, WorkerInfo, WorkerState
from pdmesh.v1 import cluster_pb2, cluster_pb2_grpc, kv_blocks_pb2, kv_blocks_pb2_grpc

log = logging.getLogger(__name__)

_PUT_SERVICE = kv_blocks_pb2.DESCRIPTOR.services_by_name["KVStore"].full_name


class StoreService:
    """A `pdmesh.server.Service`. Takes over `directory`: closing it closes that."""

    def __init__(self, config: StoreConfig, directory: Directory) -> None:
        service = config.service
        self._directory = directory
        self._registry = CollectorRegistry()
        self.journal = TransferJournal(self._registry)
        self._metrics = MetricsServer(service.host, service.metrics_port, self._registry)
        ProcessCollector(registry=self._registry)
        self._info = WorkerInfo(
            worker_id=config.store_id or f"store-{secrets.token_hex(3)}",
            incarnation=secrets.token_hex(8),
            role=Role.STORE,
            state=WorkerState.LOADING,
            address="",
        )
        self._started_at = time.monotonic()
        self._drain_requested = asyncio.Event()
        self.server = GrpcServer(service.host, service.port, service.advertised_host)
        self.blocks = StoreBlocks(config.tiers, self._on_open)
        self._channels = ChannelPool()
        self.hub = ReceiverHub(
            self.blocks, config.transport_names, self.server, service.host, service.advertised_host, self.journal
        )
        self._senders = KVSenders(
            self.blocks, self._info.incarnation, self._channels.get, self.journal, config.transport_names
        )
        self._announcer = Announcer(directory, lambda: self.info)
        fetch = FetchServicer(self.blocks, self._info.incarnation, self._senders)
        put = PutServicer(self.blocks, self.hub, self.journal)
        self.server.add(kv_blocks_pb2_grpc.add_KVBlocksServicer_to_server, fetch, FETCH_SERVICE)
        self.server.add(kv_blocks_pb2_grpc.add_KVStoreServicer_to_server, put, _PUT_SERVICE)
        self.server.add(cluster_pb2_grpc.add_WorkerServicer_to_server, _StatusServicer(self), "pdmesh.v1.Worker")

    @property
    def info(self) -> WorkerInfo:
        """This store as it is now."""
        tiers = self.blocks.tiers
        if tiers is None:
            return self._info
        stats = tiers.stats()
        host = stats["host"]
        load = with_tiers(Load(num_blocks=host.num_slots, num_free_blocks=host.num_slots - host.num_blocks), stats)
        transports = ",".join(self.journal.transports_in_use())
        return replace(self._info, facts=self.blocks.facts, load=load, kv_transports=transports)

    async def start(self) -> None:
        self._metrics.start()
        loop = asyncio.get_running_loop()

        def on_change(change: TierChange) -> None:
            # On any thread, and perhaps after the loop has gone.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._announcer.on_blocks, change.stored, change.removed, change.tier)

        self.blocks.subscribe(on_change)
        await self.server.start()
        self._info = replace(self._info, address=self.server.address)
        await self.hub.start()
        self.blocks.reopen()
        self._info = replace(self._info, state=WorkerState.READY)
        await self._announcer.start()
        await self.server.set_serving(True)
        log.info("%s keeps KV at %s", self._info.worker_id, self.server.address)

    def _on_open(self) -> None:
        assert self.blocks.tiers is not None
        self._registry.register(TierCollector(self.blocks.tiers.stats))
        self._announcer.kick()

    async def drain_asked(self) -> None:
        await self._drain_requested.wait()

    def request_drain(self) -> None:
        self._drain_requested.set()

    async def drain(self) -> None:
        self._info = replace(self._info, state=WorkerState.DRAINING)
        self._announcer.kick()
        await self.server.set_serving(False)
        await self.server.drained()

    async def close(self) -> None:
        await self._announcer.stop()
        await self.server.stop()
        await self.hub.aclose()
        await self._senders.aclose()
        await self._channels.aclose()
        if self.blocks.tiers is not None:
            await asyncio.to_thread(self.blocks.tiers.close)
        await self._metrics.aclose()
        await self._directory.aclose()

    def status(self) -> cluster_pb2.GetStatusResponse:
        """What it holds, in a worker's words."""
        tiers = self.blocks.tiers
        return cluster_pb2.GetStatusResponse(
            info=self.info.to_pb(),
            num_tickets=self.hub.num_open_tickets,
            num_request_tasks=self.server.num_active_calls,
            num_cached_blocks=tiers.stats()["host"].num_blocks if tiers is not None else 0,
            uptime_s=time.monotonic() - self._started_at,
        )


class _StatusServicer(cluster_pb2_grpc.WorkerServicer):
    def __init__(self, store: StoreService) -> None:
        self._store = store

    async def GetStatus(self, request: cluster_pb2.GetStatusRequest, context: object) -> cluster_pb2.GetStatusResponse:
        return self._store.status()

    async def Drain(self, request: cluster_pb2.DrainRequest, context: object) -> cluster_pb2.DrainResponse:
        self._store.request_drain()
        return cluster_pb2.DrainResponse()

    async def ListTransfers(
        self, request: cluster_pb2.WorkerListTransfersRequest, context: object
    ) -> cluster_pb2.WorkerListTransfersResponse:
        report = self._store.journal.report(self._store.hub.num_open_tickets, 0)
        return cluster_pb2.WorkerListTransfersResponse(report=report.to_pb())
