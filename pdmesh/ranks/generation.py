"""One start of the group, as every node is told of it, and its end."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Generation:
    """Drawn up by node 0's supervisor; the fields are those of `RankPlace`."""

    number: int
    leader_host: str
    store_port: int
    step_port: int
    token: str


@dataclass(frozen=True, slots=True)
class GroupEnd:
    """Why the ranks end.

    Attributes:
        reason: One line for a person.
        exit_code: The supervisor's, where the group is not started again; 0: rank 0 has done its work.
        fatal: A person must mend something first; each node's supervisor prints what.
    """

    reason: str
    exit_code: int
    fatal: bool = False

    @property
    def done(self) -> bool:
        return self.exit_code == 0


class Backoff:
    """Seconds to wait before the next start: none after a steady generation, else 0.5, doubling to 30."""

    _FIRST_S = 0.5
    _LAST_S = 30.0
    _STEADY_S = 60.0

    def __init__(self) -> None:
        self._next_s = self._FIRST_S

    def after(self, served_s: float) -> float:
        """What to wait after a generation that served so long; 0 where it never was ready."""
        if served_s > self._STEADY_S:
            self._next_s = self._FIRST_S
            return 0.0
        delay_s, self._next_s = self._next_s, min(2 * self._next_s, self._LAST_S)
        return delay_s
