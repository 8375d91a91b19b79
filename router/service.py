"""A router as a process: wires tokenizer, registry, watcher and servicers, and owns their lives.

start: listen (health NOT_SERVING) -> load the tokenizer -> watch the directory -> SERVING when a pair can serve
drain: NOT_SERVING -> the running calls end
close: stop watching -> stop the server -> close channels and the directory's connection
"""

import asyncio
import contextlib
import logging

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from kvstore.directory import Directory
from kvstore.watcher import Watcher
from pdmesh.channels import ChannelPool
from pdmesh.metrics_server import MetricsServer
from pdmesh.model_source import model_name
from pdmesh.server import GrpcServer
from pdmesh.types import Role
from pdmesh.v1 import cluster_pb2_grpc, inference_pb2_grpc
from router.admission import Admission
from router.cluster_servicer import ClusterServicer
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.inference_servicer import InferenceServicer
from router.registry import WorkerRegistry
from router.text.tokenizer import load_text_model

log = logging.getLogger(__name__)

_FOLLOW_INTERVAL_S = 0.5


class RouterService:
    """A `pdmesh.server.Service`. Takes over `directory`: closing it closes that."""

    def __init__(self, config: RouterConfig, directory: Directory) -> None:
        self._config = config
        self._directory = directory
        self._channels = ChannelPool()
        self._changed = asyncio.Event()
        self._registry = WorkerRegistry(
            model_name(config.model), lambda worker_id: self._watcher.age_s(worker_id), self._changed.set
        )
        self._watcher = Watcher(directory, self._registry)
        self._server = GrpcServer(config.service.host, config.service.port, config.service.advertised_host)
        self._inference = InferenceServicer(config)
        cluster = ClusterServicer(self._registry, self._channels)
        self._server.add(inference_pb2_grpc.add_InferenceServicer_to_server, self._inference, "pdmesh.v1.Inference")
        self._server.add(cluster_pb2_grpc.add_ClusterServicer_to_server, cluster, "pdmesh.v1.Cluster")
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        active = Gauge("pdmesh_router_active_requests", "Requests admitted and not ended.", registry=registry)
        active.set_function(lambda: self._inference.num_active_requests)
        self._metrics = MetricsServer(config.service.host, config.service.metrics_port, registry)
        self._following: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """host:port under which clients reach it, once started."""
        return self._server.address

    @property
    def serving(self) -> bool:
        """What health answers."""
        return self._server.serving

    @property
    def num_active_requests(self) -> int:
        return self._inference.num_active_requests

    async def start(self) -> None:
        self._metrics.start()
        await self._server.start()
        text = await asyncio.to_thread(load_text_model, self._config.model)
        self._inference.open(
            Admission(self._config, text, self._registry),
            Dispatcher(
                self._registry,
                self._channels,
                text.token_bytes,
                self._config.weights,
                self._config.short_prefill_tokens,
            ),
        )
        await self._watcher.start()
        self._following = asyncio.create_task(self._follow_workers(), name="follow-workers")
        log.info("routes for %s at %s", text.name, self.address)

    async def drain_asked(self) -> None:
        """Routers are stopped by signal only."""
        await asyncio.Event().wait()

    async def drain(self) -> None:
        self._inference.drain()
        await self._stop_following()
        await self._server.set_serving(False)
        await self._server.drained()

    async def close(self) -> None:
        await self._stop_following()
        await self._watcher.stop()
        await self._server.stop()
        await self._metrics.aclose()
        await self._channels.aclose()
        await self._directory.aclose()

    async def _follow_workers(self) -> None:
        """Keeps health and channels in step with who lives."""
        connected: set[str] = set()
        while True:
            self._changed.clear()
            addresses = self._registry.addresses()
            for address in connected - addresses:
                await self._channels.discard(address)
            connected = addresses
            serving = self._can_serve()
            if serving is not self._server.serving:
                log.info("health: %s", "SERVING" if serving else "NOT_SERVING, no decode worker takes requests")
                await self._server.set_serving(serving)
            # A worker that was lost comes back by the passing of time, which is no change that anybody tells.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FOLLOW_INTERVAL_S):
                    await self._changed.wait()

    def _can_serve(self) -> bool:
        """A decode worker is enough; only at the start, a prefill worker that is still loading is waited for."""
        if not self._registry.usable(Role.DECODE):
            return False
        prefill_awaited = self._registry.loading(Role.PREFILL) and not self._registry.usable(Role.PREFILL)
        return self._server.serving or not prefill_awaited

    async def _stop_following(self) -> None:
        task, self._following = self._following, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
