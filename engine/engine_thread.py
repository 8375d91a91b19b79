"""The thread that owns a model: it takes commands between steps, steps while anything can run, and sleeps otherwise."""

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain

from engine.api import BlockEvents, EngineStatus
from engine.core import EngineCore
from engine.leases import Reservation
from engine.outputs import StepOutput, StepOutputs
from engine.scheduler import Scheduler
from engine.step import StepPlan
from pdmesh.errors import MeshError
from pdmesh.types import Load

log = logging.getLogger(__name__)

# A thread that waits for the interpreter asks for it after so long. An event loop lets go of it in each turn for an
# instant, too short for a thread to wake up and take it, and if its turns are shorter than this the thread never gets
# to ask: at Python's 5 ms a busy loop kept the engine waiting for seconds in each step (docs/performance.md).
_SWITCH_INTERVAL_S = 20e-6

# Something to do between steps. It must not raise: whoever posts it says what becomes of its errors.
Command = Callable[[Scheduler], None]


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the thread has to tell, at once: what the last step made, and what is due before the next one.

    Iterate `outputs` once, on the receiving thread: the values are made there.
    """

    outputs: Iterable[StepOutput]
    granted: list[Reservation]
    block_events: BlockEvents


def get_interpreter_in_time() -> None:
    """Has any thread of this process that needs the interpreter get it promptly; for good, and for all threads."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


class EngineThread:
    """Runs an EngineCore. `post`, `stop` and the snapshots are for other threads; all else is its own.

    Args:
        build: Makes the core, on this thread: loading takes long, and torch's settings are per thread.
        on_start: Called on this thread once the core is there.
        deliver: Called on this thread with news.
        on_end: Called on this thread, last of all, with what ended it: None if it was told to stop.
    """

    def __init__(
        self,
        build: Callable[[], EngineCore],
        on_start: Callable[[], None],
        deliver: Callable[[Delivery], None],
        on_end: Callable[[Exception | None], None],
    ) -> None:
        self._build = build
        self._on_start = on_start
        self._deliver = deliver
        self._on_end = on_end
        self._wakeup = threading.Condition()
        self._inbox: list[Command] = []
        self._stopping = False
        # Values, replaced before and after each step: reading them needs no lock.
        self.load = Load()
        self.status = EngineStatus(0, 0, 0, 0, 0, 0)
        # A daemon: a process that forgot to close its engine ends all the same.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        get_interpreter_in_time()
        self._thread.start()

    @property
    def stopping(self) -> bool:
        return self._stopping

    def post(self, command: Command) -> None:
        """Has `command` run before the next step; once the thread is ending it is dropped."""
        with self._wakeup:
            if not self._stopping:
                self._inbox.append(command)
                self._wakeup.notify()

    def stop(self) -> None:
        """Ends the thread after the running step; idempotent."""
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify()

    def join(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        ended_by: Exception | None = None
        try:
            core = self._build()
        except Exception as error:
            # Whoever started the engine is told, and says so.
            ended_by = error
        else:
            try:
                self._serve(core)
            except MeshError as error:
                log.error("the engine's thread ends: %s", error.message, extra={"reason": error.reason})
                ended_by = error
            except Exception as error:
                log.exception("the engine's thread failed")
                ended_by = error
        self.stop()
        self._on_end(ended_by)

    def _serve(self, core: EngineCore) -> None:
        self._publish(core)
        self._on_start()
        made = StepOutputs()
        idle = True
        while (commands := self._take_commands(wait=idle)) is not None:
            for command in commands:
                command(core.scheduler)
            plan = core.schedule()
            # First what can be seen at any time, so that whoever hears of something sees what it changed.
            self._publish(core)
            # Told when the model begins its next step, what the last one made does not cost that step's preparation.
            tell = partial(self._tell, made, plan, core.scheduler.drain_block_events())
            made = core.execute(plan, meanwhile=tell)
            # An empty plan means that nothing can run before the next command.
            idle = plan.empty

    def _tell(self, made: StepOutputs, plan: StepPlan, events: BlockEvents) -> None:
        if made or plan.outputs or plan.granted or events.stored or events.removed:
            self._deliver(Delivery(chain(made, plan.outputs), plan.granted, events))

    def _take_commands(self, *, wait: bool) -> list[Command] | None:
        """What was posted since the last call; None when it is time to stop."""
        with self._wakeup:
            while wait and not self._inbox and not self._stopping:
                self._wakeup.wait()
            if self._stopping:
                return None
            commands, self._inbox = self._inbox, []
            return commands

    def _publish(self, core: EngineCore) -> None:
        self.load = core.scheduler.load()
        self.status = core.status()
