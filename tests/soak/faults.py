"""Workers that are killed or drained, one at a time, and proof of each."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Sequence

from pdmesh import AsyncClient
from pdmesh.errors import MeshError
from pdmesh.local.child import ChildProcess
from pdmesh.local.cluster import LocalCluster
from pdmesh.types import Role

_BACK_TIMEOUT_S = 90.0
_DRAIN_TIMEOUT_S = 60.0
# Between one worker's return and the next one's fault.
_LONGEST_CALM_S = 1.0
# Of the workers that are taken; the others are drained.
_KILLED = 0.7


class Supervisor:
    """`LocalCluster.watch` as a task, which starts killed workers again. Use as `async with`."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster

    async def __aenter__(self) -> "Supervisor":
        self._watching = asyncio.create_task(self._cluster.watch())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    async def take_back(self, drained: ChildProcess) -> None:
        """Starts a worker that was drained, and watches it again. Call it when no other start is due."""
        await self.__aexit__()
        await drained.start()
        await self.__aenter__()


class Faults:
    """Takes workers from a running cluster.

    Attributes:
        counts: Faults that were proven: `kill decode-0`, …
        num_hit: Requests that the router had on decode workers when these were killed.
    """

    def __init__(self, cluster: LocalCluster, supervisor: Supervisor, client: AsyncClient, draw: random.Random) -> None:
        self._children = {child.name: child for child in cluster.children}
        self._supervisor = supervisor
        self._client = client
        self._draw = draw
        self.counts = Counter[str]()
        self.num_hit = 0

    async def run(self, victims: Sequence[str], stop: asyncio.Event) -> None:
        """Until `stop`; every worker is back when it returns. `victims` are the names of those that may be taken."""
        while not stop.is_set():
            name = self._draw.choice(victims)
            before = (await self._incarnations())[name]
            fault = self._kill if self._draw.random() < _KILLED else self._drain
            await fault(self._children[name])
            await self._back(name, before)
            await asyncio.sleep(self._draw.uniform(0, _LONGEST_CALM_S))

    async def _kill(self, child: ChildProcess) -> None:
        pid = child.pid
        assert pid is not None
        assigned = {view.info.worker_id: view.num_assigned for view in await self._client.workers()}
        os.kill(pid, signal.SIGKILL)
        assert await child.wait() == -signal.SIGKILL
        self.counts[f"kill {child.name}"] += 1
        if child.name.startswith(Role.DECODE.value):
            self.num_hit += assigned[child.name]

    async def _drain(self, child: ChildProcess) -> None:
        await self._client.drain(child.name)
        async with asyncio.timeout(_DRAIN_TIMEOUT_S):
            assert await child.wait() == 0, "a drained worker ends by itself"
        self.counts[f"drain {child.name}"] += 1
        await self._supervisor.take_back(child)

    async def _back(self, name: str, before: str) -> None:
        """Returns when requests go to the worker's successor."""
        async with asyncio.timeout(_BACK_TIMEOUT_S):
            while (await self._incarnations()).get(name, before) == before:
                await asyncio.sleep(0.1)

    async def _incarnations(self) -> dict[str, str]:
        """Of the workers to which requests go."""
        try:
            views = await self._client.workers()
        except MeshError:
            return {}
        return {view.info.worker_id: view.info.incarnation for view in views if not view.excluded_because}
