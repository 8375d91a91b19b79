"""The engine without threads or event loop: scheduler and runner, stepped by hand or by LocalEngine's thread."""

import logging
import time
from collections.abc import Callable

from engine.api import EngineStatus
from engine.outputs import StepOutput, StepOutputs
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.step import StepPlan
from pdmesh.errors import InternalError, MeshError

log = logging.getLogger(__name__)


class EngineCore:
    """Owns the step, which goes one way: schedule -> run -> update. Single-threaded.

    Requests and leases come and go through `scheduler`, between steps.

    Args:
        clock: Seconds; what steps take is measured with it, for the scheduler to learn from.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._num_steps = 0

    def step(self) -> list[StepOutput]:
        """One whole step: what was due before it, then what it made."""
        plan = self.scheduler.schedule()
        return [*plan.outputs, *self.execute(plan)]

    def execute(self, plan: StepPlan) -> StepOutputs:
        """Runs what the scheduler just planned. A failure ends the requests of this step, and only those."""
        if plan.empty:
            return StepOutputs()
        self._num_steps += 1
        try:
            start = self._clock()
            result = self._runner.run(plan)
            self.scheduler.record_duration(plan.num_tokens, self._clock() - start)
            return self.scheduler.update(plan, result)
        except Exception as error:
            log.exception("a step of %d requests failed", len(plan.requests))
            return self.scheduler.fail(plan, as_mesh_error(error))

    def status(self) -> EngineStatus:
        return self.scheduler.status(self._num_steps)


def as_mesh_error(error: Exception) -> MeshError:
    """`error` itself if it is of the tree, else an InternalError that names it."""
    if isinstance(error, MeshError):
        return error
    return InternalError(f"the engine failed: {type(error).__name__}: {error}", reason="ENGINE_FAILED")
