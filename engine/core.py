"""The engine without threads or event loop: scheduler and runner, stepped by hand or by LocalEngine's thread."""

import logging

from engine.api import EngineStatus
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.step import StepOutput, StepPlan
from pdmesh.errors import InternalError, MeshError

log = logging.getLogger(__name__)


class EngineCore:
    """Owns the step, which goes one way: schedule -> run -> update. Single-threaded.

    Requests and leases come and go through `scheduler`, between steps.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._num_steps = 0

    def step(self) -> list[StepOutput]:
        """One whole step: what was due before it, then what it made."""
        plan = self.scheduler.schedule()
        return plan.outputs + self.execute(plan)

    def execute(self, plan: StepPlan) -> list[StepOutput]:
        """Runs what the scheduler just planned. A failure ends the requests of this step, and only those."""
        if not plan.scheduled:
            return []
        self._num_steps += 1
        try:
            return self.scheduler.update(plan, self._runner.run(plan))
        except Exception as error:
            log.exception("a step of %d requests failed", len(plan.scheduled))
            return self.scheduler.fail(plan, as_mesh_error(error))

    def status(self) -> EngineStatus:
        return self.scheduler.status(self._num_steps)


def as_mesh_error(error: Exception) -> MeshError:
    """`error` itself if it is of the tree, else an InternalError that names it."""
    if isinstance(error, MeshError):
        return error
    return InternalError(f"the engine failed: {type(error).__name__}: {error}", reason="ENGINE_FAILED")
