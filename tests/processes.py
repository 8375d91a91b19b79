"""A whole mesh of real processes, real sockets and a real Valkey, each of which a test can kill."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pdmesh import AsyncClient
from pdmesh.channels import ChannelPool
from pdmesh.cluster_view import WorkerView
from pdmesh.errors import MeshError
from pdmesh.health import is_serving
from pdmesh.local.child import ChildProcess, ChildSpec
from pdmesh.v1 import cluster_pb2, cluster_pb2_grpc
from tests.hosts import Host
from tests.leaks import held_by_workers
from tests.valkey import ValkeyServer

START_TIMEOUT_S = 60.0


class ProcessMesh:
    """Use as `async with ProcessMesh(model, tmp_path, …) as mesh:`; the body runs when the router is SERVING."""

    def __init__(
        self,
        model: Path,
        run_dir: Path,
        *,
        num_prefill: int = 1,
        num_decode: int = 1,
        flags: Sequence[str] = (),
        prefill_flags: Sequence[str] = (),
        decode_flags: Sequence[str] = (),
        router_flags: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.valkey = ValkeyServer()
        self.address = f"127.0.0.1:{_free_port()}"
        self._run_dir = run_dir
        self._flags = {"prefill": (*flags, *prefill_flags), "decode": (*flags, *decode_flags)}
        self.router = self._service("router", "router", "--port", self.address.rpartition(":")[2], *router_flags)
        self.prefills: list[ChildProcess] = []
        self.decodes: list[ChildProcess] = []
        for role, num_workers in (("prefill", num_prefill), ("decode", num_decode)):
            for _ in range(num_workers):
                self.add_worker(role)
        # The processes of workers that are spread over hosts, by worker id.
        self.groups: dict[str, list[ChildProcess]] = {}

    def add_group(self, worker_id: str, role: str, hosts: Sequence[Host], *arguments: str) -> list[ChildProcess]:
        """A worker with a node on each of these hosts; before the mesh is entered."""
        rendezvous = f"{hosts[0].link_address}:{29400 + len(self.groups)}"
        common = (
            "--worker-id", worker_id, "--num-threads", "1", "--dtype", "float32", "--nnodes", str(len(hosts)),
            "--rendezvous", rendezvous, *self._flags[role], *arguments,
        )  # fmt: skip
        nodes = []
        for node_rank, host in enumerate(hosts):
            # What each node is told by itself comes last: it overrules.
            own = ("--host", host.address, "--advertise", host.address, "--node-rank", str(node_rank))
            service = self._service(f"{worker_id}-node-{node_rank}", role, *common, *own, on=host)
            nodes.append(service)
        self.groups[worker_id] = nodes
        return nodes

    def add_worker(self, role: str, *flags: str) -> ChildProcess:
        """Adds one, with flags beside its role's; it starts with the mesh, or where that runs, when it is told to."""
        workers = self.prefills if role == "prefill" else self.decodes
        name = f"{role}-{len(workers)}"
        workers.append(
            self._service(
                name, role, "--worker-id", name, "--num-threads", "1", "--dtype", "float32", *self._flags[role], *flags
            )
        )
        return workers[-1]

    def _service(self, name: str, module: str, *arguments: str, on: Host | None = None) -> ChildProcess:
        command = (sys.executable, "-m", module, str(self.model), "--redis-url", self.valkey.url, *arguments)
        if on is not None:
            command = on.command(*command)
        return ChildProcess(ChildSpec(name, command, {"OMP_NUM_THREADS": "1"}), self._run_dir)

    @property
    def children(self) -> list[ChildProcess]:
        nodes = [node for group in self.groups.values() for node in group]
        return [self.router, *self.prefills, *self.decodes, *nodes]

    async def __aenter__(self) -> Self:
        self.valkey.__enter__()
        self.client = AsyncClient(self.address)
        self._channels = ChannelPool()
        try:
            for child in self.children:
                await child.start()
            await self.until(self.all_ready, "every worker ready", START_TIMEOUT_S)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.client.aclose()
        await self._channels.aclose()
        for child in self.children:
            if child.running and child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)
        await asyncio.gather(*(child.wait() for child in self.children if child.pid is not None))
        self.valkey.__exit__(None, None, None)

    async def workers(self) -> dict[str, WorkerView]:
        """The cluster as the router sees it; empty while there is no router."""
        try:
            return {view.info.worker_id: view for view in await self.client.workers()}
        except MeshError:
            return {}

    async def all_ready(self) -> bool:
        views = await self.workers()
        expected = {child.name for child in (*self.prefills, *self.decodes)} | self.groups.keys()
        usable = {worker_id for worker_id, view in views.items() if not view.excluded_because}
        return usable == expected and await self.serving()

    async def serving(self) -> bool:
        return await is_serving(self._channels.get(self.address), timeout_s=2.0)

    async def status(self, worker_id: str) -> cluster_pb2.GetStatusResponse:
        view = (await self.workers())[worker_id]
        stub = cluster_pb2_grpc.WorkerStub(self._channels.get(view.info.address))
        response: cluster_pb2.GetStatusResponse = await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=5)
        return response

    async def held(self) -> str:
        """What workers still hold, for a person; empty when they are idle."""
        return await held_by_workers([view.info for view in (await self.workers()).values()], self._channels)

    async def assert_idle(self, within_s: float = 1.0) -> None:
        deadline = asyncio.get_running_loop().time() + within_s
        while (held := await self.held()) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        assert not held, f"still held {within_s} s after the end: {held}"

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 10.0) -> None:
        """Waits for a state, asked for by an async condition; AssertionError where it does not come about."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not await condition():
            assert asyncio.get_running_loop().time() < deadline, f"never came about: {what}\n{self.logs()}"
            await asyncio.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"--- {child.name}\n{child.log_path.read_text()[-2000:]}" for child in self.children)


async def kill(child: ChildProcess) -> None:
    """SIGKILL, and proof that it is gone."""
    assert child.running
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    assert not child.running


@contextlib.contextmanager
def standing_still(child: ChildProcess) -> Iterator[None]:
    """SIGSTOP during the body, SIGCONT after it; and proof that it stands still."""
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    try:
        while (state := Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]) != "T":
            assert state != "Z", f"{child.name} is gone"
            time.sleep(0.001)
        yield
    finally:
        os.kill(child.pid, signal.SIGCONT)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
