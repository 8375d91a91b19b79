"""A rank as a real process that computes nothing: python rank_child.py DIRECTORY [RANK GENERATION MISDEED].

It tells of itself in files of DIRECTORY, each named <generation>-<what>. MISDEED, where RANK and GENERATION are its
own: "fatal" and "broken" say why they fail before they are ready; "exit" just exits 3; "deaf" serves, but does not heed
that the group goes down; "hasty" exits 0 while it should follow; "slow" is never ready. SIGUSR1 makes a rank exit 3.
"""

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from pdmesh.ranks.control import RankControl
from pdmesh.ranks.place import RankPlace

_PAGE = 4096


class Rank:
    def __init__(self, directory: Path, misdeed: str, place: RankPlace) -> None:
        self._directory, self._misdeed, self._place = directory, misdeed, place
        self._stop = threading.Event()
        self._control = RankControl(place.control_fd, self._on_down)

    def write(self, what: str, content: object) -> None:
        path = self._directory / f"{self._place.generation}-{what}"
        path.with_suffix(".part").write_text(json.dumps(content))
        path.with_suffix(".part").rename(path)

    def _on_down(self, reason: str) -> None:
        self.write(f"down-{self._place.rank}", reason)
        if self._misdeed != "deaf":
            os._exit(1)

    def run(self) -> int:
        place = self._place
        signal.signal(signal.SIGUSR1, lambda *_: os._exit(3))
        # What it starts must end with it, too.
        beside = subprocess.Popen(["sleep", "1000"])
        pids = {"pid": os.getpid(), "supervisor": os.getppid(), "beside": beside.pid}
        self.write(f"rank-{place.rank}", {**pids, "place": json.loads(place.to_json())})
        if self._misdeed in ("fatal", "broken"):
            self._control.failed("no such model", fatal=self._misdeed == "fatal")
            return 2 if self._misdeed == "fatal" else 1
        if self._misdeed == "exit":
            return 3
        if self._misdeed == "slow":
            time.sleep(60)
        return self._lead() if place.rank == 0 else self._follow()

    def _lead(self) -> int:
        place = self._place
        signal.signal(signal.SIGTERM, lambda *_: self._drain("SIGTERM"))
        signal.signal(signal.SIGINT, lambda *_: self._drain("SIGINT"))
        assert place.store_fd is not None
        with socket.socket(fileno=place.store_fd) as store:
            assert store.getsockname() == (place.leader_host, place.store_port)
        os.truncate(place.memory_fds["group"], _PAGE)
        memory = mmap.mmap(place.memory_fds["group"], _PAGE)
        followers = [socket.socket(fileno=fd) for fd in place.step_fds.values()]
        for number, follower in enumerate(followers):
            memory[number] = 7
            follower.sendall(number.to_bytes())
            assert follower.recv(1) == b"\x07"
        if place.step_fd is not None:
            remote = socket.socket(fileno=place.step_fd)
            for _ in range(place.size - place.local_size):
                follower, _ = remote.accept()
                assert follower.recv(32, socket.MSG_WAITALL).decode() == place.token
                followers.append(follower)
        self._control.ready()
        self.write("ready", time.time())
        while not self._stop.wait(0.01):
            pass
        for follower in followers:
            follower.sendall(b"\xff")
        self.write("drained", None)
        return 0

    def _drain(self, name: str) -> None:
        again = (self._directory / f"{self._place.generation}-asked").exists()
        self.write("asked-again" if again else "asked", name)
        threading.Timer(0.0 if again else 0.5, self._stop.set).start()

    def _follow(self) -> int:
        place = self._place
        if place.step_fds:
            leader = socket.socket(fileno=place.step_fds[0])
            number = leader.recv(1)[0]
            memory = mmap.mmap(place.memory_fds["group"], _PAGE)
            leader.sendall(memory[number].to_bytes())
        else:
            assert place.nnodes > 1
            leader = socket.create_connection((place.leader_host, place.step_port))
            leader.sendall(place.token.encode())
        if self._misdeed == "hasty":
            return 0
        return 0 if leader.recv(1) == b"\xff" else 1


def main() -> int:
    place = RankPlace.from_environment()
    assert place is not None
    misdeed = ""
    if len(sys.argv) > 2:
        rank, generation, misdeed = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
        misdeed = misdeed if (rank, generation) == (place.rank, place.generation) else ""
    return Rank(Path(sys.argv[1]), misdeed, place).run()


if __name__ == "__main__":
    sys.exit(main())
