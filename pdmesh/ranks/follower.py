"""The supervisor of any node but node 0.

    find node 0 -> hello -> start, when all are there -> the first end, here or there -> take all down -> again

Node 0 judges an end, and counts and waits; this one does as it says, and for itself only where node 0 is lost.
"""

import asyncio
import contextlib
import dataclasses
import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from pdmesh.errors import ConfigError, UnavailableError
from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.generation import Generation
from pdmesh.ranks.hello import Hello
from pdmesh.ranks.launch import start_ranks
from pdmesh.ranks.link import SILENCE_S, Link
from pdmesh.ranks.node import NodeRanks
from pdmesh.ranks.stop import StopAsked

log = logging.getLogger(__name__)

_RETRY_S = 0.25
_REMIND_S = 10.0


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What node 0 says of a generation's end. `exit_code` None: another follows."""

    reason: str
    exit_code: int | None
    fatal: bool


class FollowerSupervisor:
    """Runs `command` as the ranks of this node whenever node 0 says so.

    Args:
        config: The group's.
        command: Every rank's command line.
        name: The service's.
    """

    def __init__(self, config: GroupConfig, command: Sequence[str], name: str) -> None:
        self._config, self._command, self._name = config, command, name
        self._hello = Hello.of(config, command)
        self._stop = StopAsked()
        self._link: Link | None = None

    def on_signal(self, number: signal.Signals) -> None:
        """SIGTERM or SIGINT: node 0 hears of it, whose rank 0 drains; without ranks, `run` returns."""
        self._stop.ask(self._stop.count + 1)
        if self._link is not None:
            self._link.send({"stop": self._stop.count})

    async def run(self) -> int:
        """The exit code. Raises ConfigError where a person must mend something."""
        while True:
            joined = await self._stop.unless(self._joined())
            if joined is None:
                return 0
            link, generation = joined
            self._link = link
            try:
                exit_code = await self._generation(link, generation)
            finally:
                self._link = None
                link.close()
            if exit_code is not None:
                return exit_code
            if self._stop.count:
                return 1

    async def _joined(self) -> tuple[Link, Generation]:
        """Returns when node 0 starts a generation with this node in it. Raises ConfigError where it refuses."""
        loop = asyncio.get_running_loop()
        remind_at = loop.time()
        while True:
            reason = "it does not answer"
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(SILENCE_S):
                    _, link = await loop.create_connection(Link, self._config.leader_host, self._config.rendezvous_port)
                try:
                    return link, await self._started(link)
                except UnavailableError as error:
                    reason = error.message
            if loop.time() >= remind_at:
                log.info("waiting for node 0 at %s: %s", self._config.rendezvous, reason)
                remind_at = loop.time() + _REMIND_S
            await asyncio.sleep(_RETRY_S)

    async def _started(self, link: Link) -> Generation:
        try:
            link.send(self._hello.to_message())
            log.info("found node 0 at %s, which waits until every node is there", self._config.rendezvous)
            message = await link.receive()
            if "refused" in message:
                raise ConfigError(message["refused"])
            return Generation(**message["start"])
        except BaseException:
            link.close()
            raise

    async def _generation(self, link: Link, generation: Generation) -> int | None:
        """Runs it from start to the last rank's end here. The exit code; None: another follows."""
        log.info("starting ranks %s, generation %d", list(self._config.local_ranks), generation.number)
        processes = start_ranks(self._command, self._name, self._config, generation, link.local_host, None)
        ranks = NodeRanks(processes, lambda: None)
        judging = asyncio.create_task(self._judged(link, ranks, generation.number))
        try:
            await asyncio.wait((ranks.ended, judging), return_when=asyncio.FIRST_COMPLETED)
            if not judging.done():
                link.send({"ended": dataclasses.asdict(ranks.ended.result())})
        finally:
            await ranks.take_down("the group ends")
        verdict = await judging
        if verdict.exit_code is None:
            log.warning("%s; waiting for node 0 to start all ranks again", verdict.reason)
        elif verdict.fatal:
            raise ConfigError(verdict.reason)
        elif verdict.exit_code:
            log.error("%s; all ranks were ended", verdict.reason)
        return verdict.exit_code

    async def _judged(self, link: Link, ranks: NodeRanks, number: int) -> _Verdict:
        is_ready = False
        while True:
            try:
                message = await link.receive()
            except UnavailableError as error:
                never_served = number == 0 and not is_ready
                return _Verdict(f"node 0 is lost: {error.message}", 1 if never_served else None, False)
            if "down" in message:
                return _Verdict(message["down"], message["exit_code"], message["fatal"])
            if "drains" in message:
                ranks.drains()
            is_ready = is_ready or "ready" in message
