"""The ranks of one node in one generation: watched, and taken down together.

The kernel tells of every child that ends or stands still (SIGCHLD): there are no heartbeats between processes of one
machine, so a busy one raises no false alarm.
"""

import asyncio
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdmesh.local.child import how_it_ended
from pdmesh.ranks.generation import GroupEnd
from pdmesh.ranks.process import RankProcess

# What rank 0 is given to tell its clients why, and a rank that gave its reason to end by itself.
_GRACE_S = 0.7
# One rank's end shows in the others, at times sooner than in itself: so long a plainer reason is waited for.
_PLAINER_S = 0.05
# A follower that rank 0 let go may end this long before it.
_LET_GO_S = 1.0


@dataclass(frozen=True, slots=True)
class _Cause:
    """What may have ended the group: the plainest did, the first of equals, `wait_s` after any was seen."""

    plainness: int
    wait_s: float
    end: GroupEnd


class NodeRanks:
    """Watches `ranks` from its making until `take_down` has returned. One at a time in a process, on its main thread.

    Args:
        ranks: Just started; in order.
        on_ready: Called once, when rank 0 says that the group serves.

    Attributes:
        ended: Resolved with the first end among the ranks.
    """

    def __init__(self, ranks: Sequence[RankProcess], on_ready: Callable[[], None]) -> None:
        self._ranks = ranks
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[GroupEnd] = self._loop.create_future()
        self._is_ready = False
        self._passed_on: set[int] = set()
        self._drains = False
        self._suspects: list[RankProcess] = []
        self._first_seen_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_signal_handler(signal.SIGCHLD, self._look)
        for rank in ranks:
            self._loop.add_reader(rank.control, self._read, rank)
        self._look()

    def pass_on(self, number: signal.Signals) -> None:
        """Sends a signal to rank 0, which drains and exits 0."""
        self._passed_on.add(number)
        self.drains()
        for rank in self._ranks:
            if rank.rank == 0:
                rank.signal(number)

    def drains(self) -> None:
        """Rank 0 was asked to end: followers may end before it, however long it takes."""
        self._drains = True

    async def take_down(self, reason: str) -> None:
        """Ends all ranks and returns when they are gone. Idempotent.

        All are killed at once but rank 0, which is told the reason first, and who gave a reason of its own.
        """
        spared = [rank for rank in self._ranks if rank.running and (rank.rank == 0 or rank.failure is not None)]
        for rank in self._ranks:
            if rank not in spared:
                rank.kill()
            elif rank.failure is None:
                rank.tell_down(reason)
        if spared:
            await asyncio.wait([rank.exited for rank in spared], timeout=_GRACE_S)
        for rank in spared:
            rank.kill()
        await asyncio.gather(*(rank.exited for rank in self._ranks))
        self._loop.remove_signal_handler(signal.SIGCHLD)
        if self._timer is not None:
            self._timer.cancel()

    def _read(self, rank: RankProcess) -> None:
        # Closed at the other end: its end as a process, if that is what it is, comes by SIGCHLD.
        if rank.hear():
            self._loop.remove_reader(rank.control)
        self._judge()

    def _look(self) -> None:
        for rank in self._ranks:
            if not rank.exited.done() and rank.look():
                self._loop.remove_reader(rank.control)
                rank.end()
        self._judge()

    def _judge(self) -> None:
        if not self._is_ready and any(rank.is_ready for rank in self._ranks):
            self._is_ready = True
            self._on_ready()
        self._suspects += [rank for rank in self._ranks if rank not in self._suspects and self._cause(rank)]
        causes = [cause for rank in self._suspects if (cause := self._cause(rank)) is not None]
        if self.ended.done() or not causes:
            return
        now = self._loop.time()
        self._first_seen_at = self._first_seen_at or now
        cause = max(causes, key=lambda cause: cause.plainness)
        if self._timer is not None:
            self._timer.cancel()
        if (wait_s := self._first_seen_at + cause.wait_s - now) > 0:
            self._timer = self._loop.call_later(wait_s, self._judge)
        else:
            self.ended.set_result(cause.end)

    def _cause(self, rank: RankProcess) -> _Cause | None:
        """Why the group ends, as far as this rank shows; None where it shows nothing."""
        name = f"rank {rank.rank} (pid {rank.pid})"
        exit_code = rank.exited.result() if rank.exited.done() else None
        if rank.failure is not None:
            reason = f"rank {rank.rank}: {rank.failure.message}"
            fatal = rank.failure.fatal
            return _Cause(3, 0.0, GroupEnd(reason, 2, fatal)) if fatal else _Cause(1, _PLAINER_S, GroupEnd(reason, 1))
        if rank.rank == 0 and exit_code is not None and (exit_code == 0 or -exit_code in self._passed_on):
            return _Cause(4, 0.0, GroupEnd("rank 0 has ended", 0))
        if rank.is_stopped:
            return _Cause(2, 0.0, GroupEnd(f"{name} was stopped by a signal", 1))
        if exit_code is None or (exit_code == 0 and self._drains):
            return None
        if exit_code == 0:
            return _Cause(0, _LET_GO_S, GroupEnd(f"{name} ended with exit code 0, and rank 0 did not", 1))
        if exit_code > 0:
            return _Cause(1, _PLAINER_S, GroupEnd(f"{name} {how_it_ended(exit_code)}", exit_code))
        return _Cause(2, 0.0, GroupEnd(f"{name} {how_it_ended(exit_code)}", 128 - exit_code))
