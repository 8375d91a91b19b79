"""The engine without threads or event loop: scheduler and runner, stepped by hand or by LocalEngine's thread."""

import logging
import time
from collections.abc import Callable

from engine.api import EngineStatus
from engine.outputs import StepOutput, StepOutputs
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.step import StepPlan
from pdmesh.errors import InternalError, MeshError, UnavailableError
from pdmesh.hashing import BlockHash

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
        # Told of blocks whose KV is about to be overwritten, while it is still there.
        self.on_evicted: Callable[[list[tuple[int, BlockHash]]], None] = lambda evicted: None

    def step(self) -> list[StepOutput]:
        """One whole step: what was due before it, then what it made."""
        plan = self.schedule()
        return [*plan.outputs, *self.execute(plan)]

    def schedule(self) -> StepPlan:
        """Plans the next step. Nobody has written to the blocks that it gives out yet, nor been told of them."""
        plan = self.scheduler.schedule()
        evicted = self.scheduler.pool.drain_evicted()
        if evicted:
            self.on_evicted(evicted)
        return plan

    def execute(self, plan: StepPlan, meanwhile: Callable[[], None] = lambda: None) -> StepOutputs:
        """Runs what the scheduler just planned. A failure ends the requests of this step, and only those.

        Raises UnavailableError where no further step can be run: a rank is lost, or weights were overwritten.

        Args:
            meanwhile: Called once, also for an empty plan, when the next thing to come is the model's work: other
                threads that it sets going have the interpreter to themselves.
        """
        if plan.empty:
            meanwhile()
            return StepOutputs()
        self._num_steps += 1
        start = self._clock()
        try:
            batch = self._runner.build_batch(plan)
        except Exception as error:
            meanwhile()
            return self._failed(plan, error)
        meanwhile()
        try:
            result = self._runner.run(plan, batch)
            self.scheduler.record_duration(plan.num_tokens, self._clock() - start)
            return self.scheduler.update(plan, result)
        except UnavailableError:
            raise
        except Exception as error:
            return self._failed(plan, error)

    def _failed(self, plan: StepPlan, error: Exception) -> StepOutputs:
        log.error("a step of %d requests failed", len(plan.requests), exc_info=error)
        return self.scheduler.fail(plan, as_mesh_error(error))

    def status(self) -> EngineStatus:
        return self.scheduler.status(self._num_steps)


def as_mesh_error(error: Exception) -> MeshError:
    """`error` itself if it is of the tree, else an InternalError that names it."""
    if isinstance(error, MeshError):
        return error
    return InternalError(f"the engine failed: {type(error).__name__}: {error}", reason="ENGINE_FAILED")
