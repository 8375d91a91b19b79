"""The step functions of kvstore/transfer/states.py, as the model calls them: remembered, and with time taken out.

Time stands still at 0, so that a lease that is alive has always all of its time left; one event, and only that, comes
when every lease is over. Of failures the model keeps what others act upon.
"""

import functools
from dataclasses import replace

from kvstore.transfer.states import (
    LEASE_S,
    Failure,
    Receiving,
    ReceivingAction,
    ReceivingEvent,
    Sending,
    SendingAction,
    SendingEvent,
    Tick,
)
from pdmesh.errors import UnavailableError

FAILURE = Failure(UnavailableError, "SOMETHING", "something went wrong")
EXPIRED = Failure(UnavailableError, "LEASE_EXPIRED", "something went wrong")


# By type, too: a seeded mistake is a kind of Receiving that is equal to a right one of the same values.
@functools.lru_cache(maxsize=100_000, typed=True)
def receive(receiving: Receiving, event: ReceivingEvent) -> tuple[Receiving, tuple[ReceivingAction, ...]]:
    """Raises AssertionError where the books do not add up afterwards."""
    after, actions = receiving.step(event, LEASE_S if event == Tick() else 0.0)
    after.check_invariants()
    if after.failure is not None:
        after = after._replace(failure=_plain(after.failure))
    return after, actions


@functools.lru_cache(maxsize=100_000)
def send(sending: Sending, event: SendingEvent) -> tuple[Sending, tuple[SendingAction, ...]]:
    after, actions = sending.step(event, LEASE_S if event == Tick() else 0.0)
    if after.failure is not None:
        after = replace(after, failure=_plain(after.failure))
    return after, actions


def _plain(failure: Failure) -> Failure:
    return EXPIRED if failure.reason == EXPIRED.reason else FAILURE
