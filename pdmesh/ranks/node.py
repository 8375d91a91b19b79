"""The ranks of one node in one generation: watched, and taken down together.

The kernel tells of every child that ends or stands still (SIGCHLD): there are no heartbeats between processes of one
machine, so a busy one raises no false alarm.
"""

import asyncio
import signal
from collections.abc import Callable, Sequence

from pdmesh.local.child import how_it_ended
from pdmesh.ranks.generation import GroupEnd
from pdmesh.ranks.process import RankProcess

# What rank 0 is given to tell its clients why, and a rank that gave its reason to end by itself.
_GRACE_S = 0.7
# A follower that rank 0 let go may end this long before it.
_LET_GO_S = 1.0


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
        self._let_go: asyncio.TimerHandle | None = None
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
        if self._let_go is not None:
            self._let_go.cancel()

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
        if self._let_go is not None:
            self._let_go.cancel()

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
        if self.ended.done():
            return
        ends = [end for rank in self._ranks if (end := self._end_of(rank)) is not None]
        if ends:
            # Several at once: what only a person can mend, then what a rank knows of itself, then how others saw it.
            self.ended.set_result(max(ends, key=lambda end: end[0])[1])

    def _end_of(self, rank: RankProcess) -> tuple[int, GroupEnd] | None:
        """How well this explains the group's end, and that end; None where it is no end."""
        if rank.failure is not None:
            end = GroupEnd(f"rank {rank.rank}: {rank.failure.message}", 1 + rank.failure.fatal, rank.failure.fatal)
            return 3 + rank.failure.fatal, end
        name = f"rank {rank.rank} (pid {rank.pid})"
        if rank.is_stopped:
            return 2, GroupEnd(f"{name} was stopped by a signal", 1)
        if not rank.exited.done():
            return None
        exit_code = rank.exited.result()
        if rank.rank == 0 and (exit_code == 0 or -exit_code in self._passed_on):
            return 5, GroupEnd("rank 0 has ended", 0)
        if exit_code == 0:
            return self._let_go_end(name)
        end = GroupEnd(f"{name} {how_it_ended(exit_code)}", exit_code if exit_code > 0 else 128 - exit_code)
        return (1 if exit_code > 0 else 2), end

    def _let_go_end(self, name: str) -> tuple[int, GroupEnd] | None:
        """The end that a follower's exit code 0 makes: none while rank 0 may still follow it."""
        if self._drains:
            return None
        if self._let_go is None:
            self._let_go = self._loop.call_later(_LET_GO_S, self._judge)
        if self._loop.time() < self._let_go.when():
            return None
        return 0, GroupEnd(f"{name} ended with exit code 0, and rank 0 did not", 1)
