"""A whole mesh in one process: real services on real sockets, an in-process directory, engines on threads.

Ends every scenario with `assert_idle`: nothing held, nothing running, every block back.
"""

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from decode.config import DecodeConfig
from decode.service import DecodeService
from engine.config import EngineConfig
from engine.local_engine import LocalEngine
from kvstore.directory import Directory
from kvstore.memory_directory import MemoryDirectory
from kvstore.tiers.config import TierConfig
from pdmesh import AsyncClient
from pdmesh.config import ServiceConfig
from prefill.config import PrefillConfig
from prefill.service import PrefillService
from router.config import RouterConfig
from router.service import RouterService
from worker.config import WorkerConfig

WorkerService = PrefillService | DecodeService


@dataclass(eq=False)
class Mesh:
    """Use as `async with Mesh(model) as mesh:`; the body runs when the router is SERVING.

    Attributes:
        model: Model directory.
        num_prefill: Prefill workers.
        num_decode: Decode workers.
        transports: What decode workers receive KV on.
        engine: Fields of EngineConfig.
        decode: Fields of DecodeConfig.
        router: Fields of RouterConfig.
        prefill_tiers: Fields of TierConfig of prefill workers; in kv_disk_dir each has a directory of its own.
        decode_tiers: Likewise.
        max_requests: Of each worker.
        directory: Shared by all; none of the services closes it.
    """

    model: Path
    num_prefill: int = 1
    num_decode: int = 1
    transports: str = "shm,tcp,grpc"
    engine: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    prefill_tiers: dict[str, Any] = field(default_factory=dict)
    decode_tiers: dict[str, Any] = field(default_factory=dict)
    max_requests: int = 256
    directory: Directory = field(default_factory=MemoryDirectory)

    def __post_init__(self) -> None:
        self.prefills: list[PrefillService] = []
        self.decodes: list[DecodeService] = []

    async def __aenter__(self) -> Self:
        self._tasks_before = asyncio.all_tasks()
        await asyncio.gather(
            *(self.add_decode() for _ in range(self.num_decode)), *(self.add_prefill() for _ in range(self.num_prefill))
        )
        self.service = RouterService(RouterConfig(model=str(self.model), **self.router), self.directory)
        await self.service.start()
        self.client = AsyncClient(self.service.address)
        async with asyncio.timeout(20):
            while not self.service.serving:
                await asyncio.sleep(0.02)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.client.aclose()
        await self.service.close()
        await asyncio.gather(*(worker.close() for worker in self.workers))
        if error is None:
            await self._assert_nothing_left()

    @property
    def workers(self) -> list[WorkerService]:
        return [*self.prefills, *self.decodes]

    async def add_prefill(self) -> PrefillService:
        config = PrefillConfig(self._worker_config(f"prefill-{len(self.prefills)}", self.prefill_tiers))
        service = PrefillService(config, LocalEngine(config.worker.engine, lend_kv=True), self.directory)
        self.prefills.append(service)
        await service.start()
        return service

    async def add_decode(self) -> DecodeService:
        worker = self._worker_config(f"decode-{len(self.decodes)}", self.decode_tiers)
        config = DecodeConfig(**{"worker": worker, "transports": self.transports, **self.decode})
        service = DecodeService(config, LocalEngine(config.worker.engine), self.directory)
        self.decodes.append(service)
        await service.start()
        return service

    def _worker_config(self, worker_id: str, tiers: dict[str, Any]) -> WorkerConfig:
        engine = EngineConfig(
            **{"model": str(self.model), "dtype": "float32", "num_blocks": 512, "num_threads": 1, **self.engine}
        )
        if "kv_disk_dir" in tiers:
            tiers = {**tiers, "kv_disk_dir": f"{tiers['kv_disk_dir']}/{worker_id}"}
        return WorkerConfig(ServiceConfig(), engine, TierConfig(**tiers), worker_id, self.max_requests)

    async def _assert_nothing_left(self) -> None:
        """Closed services leave no registration, no task and no thread of ours."""
        left = [entry for entry in await self.directory.registrations() if entry.info is not None]
        assert not left, f"registrations left: {left}"
        tasks = [task.get_name() for task in asyncio.all_tasks() - self._tasks_before if not task.done()]
        assert not tasks, f"tasks left: {tasks}"
        # Those of asyncio's and gRPC's own pools stay; ours have names.
        ours = [thread.name for thread in threading.enumerate() if thread.name.startswith(("kv-", "engine"))]
        assert not ours, f"threads left: {ours}"

    def held(self) -> str:
        """What somebody still holds, for a person; empty when the mesh is idle."""
        found = []
        if self.service.num_active_requests:
            found.append(f"router: {self.service.num_active_requests} requests")
        for worker in self.workers:
            status = worker.host.status()
            counts = {
                "requests": status.num_requests,
                "leases": status.num_leases,
                "tickets": status.num_tickets,
                "transfers": worker.host.journal.num_live,
                "tasks": status.num_request_tasks,
                "blocks": status.info.load.num_blocks - status.info.load.num_free_blocks,
            }
            found += [f"{status.info.worker_id}: {count} {name}" for name, count in counts.items() if count]
        return "; ".join(found)

    async def assert_idle(self, within_s: float = 1.0) -> None:
        """Everything is given back within `within_s` seconds from now."""
        deadline = asyncio.get_running_loop().time() + within_s
        while self.held() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        assert not self.held(), f"still held {within_s} s after the end: {self.held()}"
