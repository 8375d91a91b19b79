"""What is tried again, how long after, and when the cluster is given up."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from pdmesh.errors import InvalidRequestError, MeshError, NotFoundError, OverloadedError, UnavailableError

# The request's own fault: it fails however often it is tried.
DEFINITE_ERRORS = (InvalidRequestError, NotFoundError)

MAX_FAILURES = 5
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
# So long a silence is told of; a shorter one is a worker that was lost, or a queue.
_SILENCE_S = 5.0


@dataclass(slots=True)
class Attempts:
    """What became of one request so far.

    Attributes:
        admitted: The router took the attempt that runs.
        num_tries: Attempts that failed.
        num_failures: Those among them that may be the request's fault: it was taken, and then lost.
        first_failure_at: By the monotonic clock.
    """

    admitted: bool = False
    num_tries: int = 0
    num_failures: int = 0
    first_failure_at: float = 0.0


class Patience:
    """Shared by all requests of a run.

    A request that was taken and lost MAX_FAILURES times, while others were answered, fails: it may be what kills the
    workers. Where nobody is answered it is the cluster that fails: then all requests wait, up to `wait_s`.

    Args:
        wait_s: Seconds without any answer after which the run ends.
        say: Tells a person.
    """

    def __init__(self, wait_s: float, say: Callable[[str], None]) -> None:
        self._wait_s = wait_s
        self._say = say
        self._answered_at = time.monotonic()
        self._told = False

    def answered(self) -> None:
        """The cluster gave a token, or a definite answer."""
        now = time.monotonic()
        if self._told:
            self._say(f"the cluster answers again, after {now - self._answered_at:.0f} s")
            self._told = False
        self._answered_at = now

    async def pause(self, error: MeshError, attempts: Attempts) -> None:
        """Returns when the request is to be tried again.

        Raises `error` where it is not, and ClusterLostError where the cluster is given up.
        """
        now = time.monotonic()
        silent_s = now - self._answered_at
        attempts.num_tries += 1
        if attempts.admitted and not isinstance(error, OverloadedError):
            attempts.num_failures += 1
            attempts.first_failure_at = attempts.first_failure_at or now
            if attempts.num_failures >= MAX_FAILURES and self._answered_at > attempts.first_failure_at:
                raise error
        attempts.admitted = False
        if silent_s >= self._wait_s:
            raise ClusterLostError(
                f"no request was answered for {silent_s:.0f} s ({error.message}); every result so far is kept, and the "
                "same command goes on after them"
            )
        if not self._told and (error.reason == "NO_CONNECTION" or silent_s >= _SILENCE_S):
            self._say(f"waiting up to {self._wait_s:.0f} s for the cluster: {error.message}")
            self._told = True
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(attempts.num_tries - 1, 10)) * random.uniform(0.5, 1)
        await asyncio.sleep(min(pause_s, self._wait_s - silent_s))


class ClusterLostError(UnavailableError):
    """Ends a run, not a request."""

    reason = "CLUSTER_LOST"
