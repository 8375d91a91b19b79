"""Ways to get a hand-off wrong, one small change each, that an exploration must find."""

from kvstore.transfer.states import (
    Accept,
    BeginWrite,
    Close,
    Done,
    Ended,
    Failed,
    Failure,
    Finish,
    Quiet,
    Receiving,
    ReceivingAction,
    Release,
    Sending,
    SendingAction,
    TellFailed,
    TransferState,
)


class _Unchecked(Receiving):
    """Its books are not looked at: what is wrong with it must show in the blocks."""

    __slots__ = ()

    def check_invariants(self) -> None:
        return


class BelievesFinish(_Unchecked):
    """Finish is accepted with bytes missing."""

    __slots__ = ()

    def _finish(self, event: Finish) -> tuple[Receiving, tuple[ReceivingAction, ...]]:
        if self.state is not TransferState.RECEIVING or self.num_writing:
            return super()._finish(event)
        return self._replace(state=TransferState.DONE), (Accept(), Ended(), Quiet())


class CountsTwice(_Unchecked):
    """A part that comes a second time is accepted, and its bytes count again."""

    __slots__ = ()

    def _begin_write(self, event: BeginWrite, now: float) -> tuple[Receiving, tuple[ReceivingAction, ...]]:
        after, actions = self._replace(claims=())._begin_write_once(event, now)
        return (after._replace(claims=()), actions) if Accept() in actions else (self, actions)

    def _begin_write_once(self, event: BeginWrite, now: float) -> tuple[Receiving, tuple[ReceivingAction, ...]]:
        return super()._begin_write(event, now)


class WritesAfterTheEnd(_Unchecked):
    """A writer that began in time is let in after the transfer has failed, too."""

    __slots__ = ()

    def _begin_write(self, event: BeginWrite, now: float) -> tuple[Receiving, tuple[ReceivingAction, ...]]:
        if self.state is not TransferState.FAILED:
            return super()._begin_write(event, now)
        return self._replace(num_writing=self.num_writing + 1), (Accept(),)


class ReleasesWhileBusy(Sending):
    """The blocks are given back when the transfer is given up, and not when nobody reads them any more."""

    __slots__ = ()

    def _abandon(self, failure: Failure) -> tuple[Sending, tuple[SendingAction, ...]]:
        after, actions = super()._abandon(failure)
        return after, (*actions, Release()) if Close() in actions else actions

    def _came_back(self, event: Done | Failed) -> tuple[Sending, tuple[SendingAction, ...]]:
        after, actions = super()._came_back(event)
        return after, () if self.failure is not None else actions


class KeepsFailureToItself(Sending):
    """The receiver is not told that a grant came to nothing."""

    __slots__ = ()

    def _came_back(self, event: Done | Failed) -> tuple[Sending, tuple[SendingAction, ...]]:
        after, actions = super()._came_back(event)
        return after, tuple(action for action in actions if not isinstance(action, TellFailed))


class KeepsBlocks(Sending):
    """Blocks of a transfer that was given up before it began are not given back."""

    __slots__ = ()

    def _abandon(self, failure: Failure) -> tuple[Sending, tuple[SendingAction, ...]]:
        after, actions = super()._abandon(failure)
        return after, tuple(action for action in actions if action != Release())
