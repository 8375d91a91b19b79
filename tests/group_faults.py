"""What befalls one rank of a worker's group, and how its group takes it: measured from the fault on."""

import asyncio
import json
import os
import resource
import signal
import socket
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil

from pdmesh.local.child import ChildProcess
from pdmesh.ranks.place import ENV_NAME
from tests.processes import ProcessMesh

# Less than a rank has: whatever it asks the system for is refused.
_LITTLE_MEMORY_BYTES = 1


class Fault(Enum):
    """KILL is also what the kernel does for want of memory; NO_MEMORY is what a limit does: allocating fails."""

    KILL = "kill"
    STOP = "stop"
    NO_MEMORY = "no_memory"


@dataclass(frozen=True)
class RunningGroup:
    """The ranks of a worker in one generation.

    Attributes:
        pids: By rank.
        incarnation: Of the worker, as rank 0 announced it.
        address: Of rank 0's gRPC server.
    """

    worker: ChildProcess
    pids: dict[int, int]
    generation: int
    incarnation: str
    address: str

    @classmethod
    async def of(cls, mesh: ProcessMesh, worker: ChildProcess) -> "RunningGroup":
        info = (await mesh.workers())[worker.name].info
        places = {child.pid: _place(child) for child in psutil.Process(worker.pid).children()}
        pids = {place["rank"]: pid for pid, place in places.items()}
        (generation,) = {place["generation"] for place in places.values()}
        assert sorted(pids) == list(range(info.tp_size * info.pp_size))
        return cls(worker, pids, generation, info.incarnation, info.address)

    def strike(self, rank: int, fault: Fault) -> None:
        """Returns once the fault is there; NO_MEMORY shows when the rank next asks for some."""
        pid = self.pids[rank]
        if fault is Fault.NO_MEMORY:
            resource.prlimit(pid, resource.RLIMIT_AS, (_LITTLE_MEMORY_BYTES, resource.RLIM_INFINITY))
        else:
            os.kill(pid, signal.SIGKILL if fault is Fault.KILL else signal.SIGSTOP)

    @property
    def num_left(self) -> int:
        """Its processes that are not gone; a zombie is."""
        return sum(_is_alive(pid) for pid in self.pids.values())

    @property
    def is_down(self) -> bool:
        """Nobody answers at its address, and no process of it is left."""
        return self.num_left == 0 and _refuses(self.address)

    async def down(self, since: float, within_s: float) -> float:
        """Seconds from `since` (monotonic) to its end; AssertionError where that takes longer than `within_s`."""
        while not self.is_down:
            assert time.monotonic() - since < within_s, f"{self.num_left} ranks are left:\n{self.log}"
            await asyncio.sleep(0.005)
        return time.monotonic() - since

    async def serving_again(self, mesh: ProcessMesh, since: float, within_s: float) -> float:
        """Seconds from `since` until the router uses its next generation, under the same worker id."""

        async def serves() -> bool:
            view = (await mesh.workers()).get(self.worker.name)
            return view is not None and view.info.incarnation != self.incarnation and not view.excluded_because

        await mesh.until(serves, f"{self.worker.name} serves again", within_s)
        took_s = time.monotonic() - since
        again = await RunningGroup.of(mesh, self.worker)
        assert again.generation == self.generation + 1
        assert not set(again.pids.values()) & set(self.pids.values())
        return took_s

    @property
    def log(self) -> str:
        return self.worker.log_path.read_text()


def _place(process: psutil.Process) -> dict[str, int]:
    place: dict[str, int] = json.loads(process.environ()[ENV_NAME])
    return place


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _refuses(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=0.2).close()
    except OSError:
        return True
    return False
