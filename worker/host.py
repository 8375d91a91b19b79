"""The process around an engine, the same for both roles.

    start: listen -> announce LOADING -> load the model -> announce READY, health SERVING
    drain: announce DRAINING, health NOT_SERVING -> the running calls end
    close: leave the directory -> stop the server -> stop the engine

Owns the engine, the servers, the announcer and the directory's connection; the role's service adds what it serves, and
hands `journal` to whatever moves KV, `registry` to whatever else is measured.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from engine.api import Engine
from kvstore.announcer import Announcer
from kvstore.directory import Directory
from kvstore.tiers.base import TierChange
from kvstore.tiers.metrics import TierCollector
from kvstore.tiers.stack import TierStack, with_tiers
from kvstore.transfer.journal import TransferJournal
from pdmesh.errors import OverloadedError, PreconditionError, UnavailableError
from pdmesh.metrics_server import MetricsServer
from pdmesh.server import GrpcServer
from pdmesh.transfers import TransferReport
from pdmesh.types import Role, WorkerInfo, WorkerState
from pdmesh.v1 import cluster_pb2, cluster_pb2_grpc
from worker.config import WorkerConfig

log = logging.getLogger(__name__)


class WorkerHost:
    """See the module.

    Args:
        config: What the operator said.
        role: What this worker does.
        engine: Not started yet.
        directory: Where it is announced.
    """

    def __init__(self, config: WorkerConfig, role: Role, engine: Engine, directory: Directory) -> None:
        service = config.service
        self.engine = engine
        self.server = GrpcServer(service.host, service.port, service.advertised_host)
        self.server.add(cluster_pb2_grpc.add_WorkerServicer_to_server, _WorkerServicer(self), "pdmesh.v1.Worker")
        self._drain_requested = asyncio.Event()
        self.tiers: TierStack | None = None
        self._tier_config = config.tiers
        self.num_tickets: Callable[[], int] = lambda: 0
        self.registry = CollectorRegistry()
        self.journal = TransferJournal(self.registry)
        self._metrics = MetricsServer(service.host, service.metrics_port, self.registry)
        ProcessCollector(registry=self.registry)
        tickets = Gauge("pdmesh_kv_tickets", "Tickets that a sender could still use.", registry=self.registry)
        tickets.set_function(lambda: self.num_tickets())
        leases = Gauge("pdmesh_kv_leases", "Block leases held.", registry=self.registry)
        leases.set_function(lambda: self.num_leases)
        self._max_requests = config.max_requests
        self._num_admitted = 0
        self._directory = directory
        self._announcer = Announcer(directory, lambda: self.info)
        self._started_at = time.monotonic()
        self._info = WorkerInfo(
            worker_id=config.worker_id or f"{role.value}-{secrets.token_hex(3)}",
            incarnation=secrets.token_hex(8),
            role=role,
            state=WorkerState.LOADING,
            address="",
            tp_size=config.group.tp,
            pp_size=config.group.pp,
        )

    @property
    def info(self) -> WorkerInfo:
        """This worker as it is now."""
        if self._info.state is WorkerState.LOADING:
            return self._info
        transports = ",".join(self.journal.transports_in_use())
        load = self.engine.load()
        if self.tiers is not None:
            load = with_tiers(load, self.tiers.stats())
        return replace(self._info, load=load, kv_transports=transports)

    @property
    def worker_id(self) -> str:
        return self._info.worker_id

    @property
    def incarnation(self) -> str:
        return self._info.incarnation

    async def start(self) -> None:
        self._metrics.start()
        await self.server.start()
        self._info = replace(self._info, address=self.server.address)
        await self._announcer.start()
        started = time.monotonic()
        await self.engine.start(self._on_progress)
        self.engine.subscribe_blocks(lambda events: self._announcer.on_blocks(events.stored, events.removed))
        self._open_tiers()
        loading_s, weight_bytes = time.monotonic() - started, self._info.total_bytes
        self._info = replace(
            self._info, state=WorkerState.READY, facts=self.engine.facts, model=self.engine.model, loaded_bytes=0,
            total_bytes=0,
        )  # fmt: skip
        self._announcer.kick()
        await self.server.set_serving(True)
        log.info(
            "%s serves %s at %s: loaded %.0f MB in %.1f s, %.0f MB/s",
            self.worker_id, self.engine.model.name, self.server.address, weight_bytes / 1e6, loading_s,
            weight_bytes / 1e6 / loading_s,
        )  # fmt: skip

    def _open_tiers(self) -> None:
        """Has KV that leaves the engine's cache kept, where the operator gave room for it. Raises ConfigError."""
        self.tiers = self._tier_config.open(self.engine.facts, self.engine.memory.block_bytes)
        if self.tiers is None:
            return
        loop = asyncio.get_running_loop()

        def on_change(change: TierChange) -> None:
            # On any thread, and perhaps after the loop has gone.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._announcer.on_blocks, change.stored, change.removed, change.tier)

        self.tiers.subscribe(on_change)
        self.registry.register(TierCollector(self.tiers.stats))
        self.engine.keep_evicted(self.tiers.put)

    def _on_progress(self, loaded_bytes: int, total_bytes: int) -> None:
        self._info = replace(self._info, loaded_bytes=loaded_bytes, total_bytes=total_bytes)

    async def leaving_asked(self) -> None:
        """Returns when this worker was asked to drain. Raises what the engine ended with, if that comes first."""
        asked = asyncio.create_task(self._drain_requested.wait())
        ended = asyncio.create_task(self.engine.wait_ended())
        try:
            await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise ended.result()
        finally:
            asked.cancel()
            ended.cancel()

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
        await self.engine.close()
        if self.tiers is not None:
            await asyncio.to_thread(self.tiers.close)
        await self._metrics.aclose()
        await self._directory.aclose()

    @contextlib.contextmanager
    def admitted(self, expected_incarnation: str) -> Iterator[None]:
        """Holds one of the worker's request places; refuses at once where there is none.

        Raises PreconditionError for a caller that means a past incarnation, UnavailableError while loading or
        draining, OverloadedError when full.
        """
        if expected_incarnation and expected_incarnation != self.incarnation:
            raise PreconditionError(
                f"{self.worker_id} was restarted: incarnation {self.incarnation}, expected {expected_incarnation}",
                reason="STALE_INCARNATION",
                stage="admission",
            )
        if self._info.state is not WorkerState.READY:
            raise UnavailableError(
                f"{self.worker_id} is {self._info.state.value}; take another worker",
                reason=f"WORKER_{self._info.state.name}",
                stage="admission",
            )
        if self._num_admitted >= self._max_requests:
            raise OverloadedError(
                f"{self.worker_id} holds {self._max_requests} requests, its limit; take another worker",
                reason="WORKER_FULL",
                stage="admission",
                details={"limit": str(self._max_requests)},
            )
        self._num_admitted += 1
        try:
            yield
        finally:
            self._num_admitted -= 1

    @property
    def num_leases(self) -> int:
        """Block leases held for transfers and imported prompts."""
        return self.engine.status().num_leases if self._info.state is not WorkerState.LOADING else 0

    def transfers(self) -> TransferReport:
        """What this process knows of its KV transfers."""
        return self.journal.report(self.num_tickets(), self.num_leases)

    def status(self) -> cluster_pb2.GetStatusResponse:
        held = self.engine.status() if self._info.state is not WorkerState.LOADING else None
        return cluster_pb2.GetStatusResponse(
            info=self.info.to_pb(),
            num_requests=held.num_requests if held else 0,
            num_leases=self.num_leases,
            num_tickets=self.num_tickets(),
            num_request_tasks=self.server.num_active_calls,
            num_cached_blocks=held.num_cached_blocks if held else 0,
            uptime_s=time.monotonic() - self._started_at,
            num_steps=held.num_steps if held else 0,
            ranks=[cluster_pb2.RankStatus(**asdict(rank)) for rank in self.engine.ranks] if held else (),
        )


class _WorkerServicer(cluster_pb2_grpc.WorkerServicer):
    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def GetStatus(self, request: cluster_pb2.GetStatusRequest, context: object) -> cluster_pb2.GetStatusResponse:
        return self._host.status()

    async def Drain(self, request: cluster_pb2.DrainRequest, context: object) -> cluster_pb2.DrainResponse:
        log.info("asked to drain", extra={"worker_id": self._host.worker_id})
        self._host.request_drain()
        return cluster_pb2.DrainResponse()

    async def ListTransfers(
        self, request: cluster_pb2.WorkerListTransfersRequest, context: object
    ) -> cluster_pb2.WorkerListTransfersResponse:
        return cluster_pb2.WorkerListTransfersResponse(report=self._host.transfers().to_pb())
