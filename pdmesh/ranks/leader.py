"""Node 0's supervisor, which is the only one where there is one node.

    gather the nodes -> start a generation everywhere -> its first end -> tell all, take all down -> wait -> again

One node is a group like any other, without a rendezvous.
"""

import asyncio
import dataclasses
import itertools
import logging
import secrets
import signal
from collections.abc import Sequence
from contextlib import closing

from pdmesh.errors import ConfigError
from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.generation import Backoff, Generation, GroupEnd
from pdmesh.ranks.hello import Hello
from pdmesh.ranks.launch import Listeners, start_ranks
from pdmesh.ranks.link import Message
from pdmesh.ranks.node import NodeRanks
from pdmesh.ranks.process import RankProcess
from pdmesh.ranks.rendezvous import Peer, Rendezvous
from pdmesh.ranks.stop import StopAsked

log = logging.getLogger(__name__)


class LeaderSupervisor:
    """Runs `command` as the ranks of node 0, and says when the other nodes run theirs.

    Args:
        config: The group's.
        command: Every rank's command line.
        name: The service's.
    """

    def __init__(self, config: GroupConfig, command: Sequence[str], name: str) -> None:
        self._config, self._command, self._name = config, command, name
        self._rendezvous: Rendezvous | None = None
        # An IP address, which the leader's host may not be.
        self._address = config.leader_host
        self._backoff = Backoff()
        self._stop = StopAsked()
        self._num_signals = 0
        self._peers: list[Peer] = []
        self._ranks: NodeRanks | None = None
        self._ready_at: float | None = None

    def on_signal(self, number: signal.Signals) -> None:
        """SIGTERM or SIGINT: rank 0 gets it; between generations, `run` returns."""
        self._num_signals += 1
        self._on_stop(self._num_signals, number)

    def _on_stop(self, count: int, number: signal.Signals = signal.SIGTERM) -> None:
        # Each node counts for itself: where a whole group is told to stop, rank 0 hears of it once.
        if self._stop.ask(count) and self._ranks is not None:
            self._ranks.pass_on(number)
            self._tell({"drains": True})

    async def run(self) -> int:
        """The exit code. Raises ConfigError where a person must mend something."""
        if self._config.nnodes == 1:
            return await self._run()
        self._rendezvous = Rendezvous(self._config, Hello.of(self._config, self._command), self._on_stop)
        self._address = await self._rendezvous.open()
        try:
            return await self._run()
        finally:
            await self._rendezvous.aclose()

    async def _run(self) -> int:
        for number in itertools.count():
            if self._rendezvous is not None:
                peers = await self._stop.unless(self._rendezvous.gathered())
                if peers is None:
                    return 0
                self._peers = peers
            end, last = await self._generation(number)
            if last:
                return end.exit_code
            loop = asyncio.get_running_loop()
            delay_s = self._backoff.after(0.0 if self._ready_at is None else loop.time() - self._ready_at)
            log.warning("%s; starting all ranks again in %g s", end.reason, delay_s)
            await self._stop.unless(asyncio.sleep(delay_s))
            if self._stop.count:
                return 0
        raise AssertionError("there is always a next number")

    async def _generation(self, number: int) -> tuple[GroupEnd, bool]:
        """Runs it from start to the last rank's end; returns why it ended, and whether no other follows."""
        self._ready_at = None
        reason = "their supervisor failed"
        self._ranks = ranks = NodeRanks(self._start(number), self._on_ready)
        try:
            ends = [ranks.ended, *(peer.ended for peer in self._peers)]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            # What only a person can mend explains the rest.
            end = max((done.result() for done in ends if done.done()), key=lambda end: end.fatal)
            reason = end.reason
            last = self._is_last(number, end)
            self._tell({"down": reason, "exit_code": end.exit_code if last else None, "fatal": end.fatal})
            for peer in self._peers:
                peer.link.close()
        finally:
            await ranks.take_down(reason)
            self._ranks = None
        if last and end.fatal:
            raise ConfigError(end.reason)
        if last and not end.done:
            log.error("%s; all ranks were ended", end.reason)
        return end, last

    def _start(self, number: int) -> list[RankProcess]:
        with closing(Listeners.open(self._address, self._config.nnodes)) as listeners:
            generation = Generation(
                number, self._config.leader_host, listeners.store_port, listeners.step_port, secrets.token_hex(16)
            )
            log.info("starting %d ranks, generation %d", self._config.size, number)
            self._tell({"start": dataclasses.asdict(generation)})
            return start_ranks(self._command, self._name, self._config, generation, self._config.leader_host, listeners)

    def _is_last(self, number: int, end: GroupEnd) -> bool:
        """Whether no generation follows. What could not even start the first time is not mended by trying again."""
        never_served = number == 0 and self._ready_at is None
        return end.done or end.fatal or never_served or self._stop.count > 0

    def _on_ready(self) -> None:
        self._ready_at = asyncio.get_running_loop().time()
        self._tell({"ready": True})

    def _tell(self, message: Message) -> None:
        for peer in self._peers:
            peer.link.send(message)
