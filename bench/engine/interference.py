"""Who used the processor while an engine was measured: the engines that wait must not, and nobody else should.

Threads that wait for each other at every step of a model lose far more than the time that others take from them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from bench.engine.processes import EngineProcess


@dataclass(frozen=True, slots=True)
class ProcessorTimes:
    """Seconds of processor time so far, and the clock."""

    clock: float
    all_processes: float
    bench: float
    measured: float
    waiting: float


@dataclass(frozen=True, slots=True)
class Interference:
    """In cores: what engines that wait have used, and what processes that are not the bench's have."""

    waiting_cores: float
    foreign_cores: float


def processor_times(measured: EngineProcess, waiting: Sequence[EngineProcess]) -> ProcessorTimes:
    busy = psutil.cpu_times()
    bench = psutil.Process().cpu_times()
    return ProcessorTimes(
        clock=time.perf_counter(),
        # Time stolen by the machine's other guests is lost like what other processes take.
        all_processes=busy.user + busy.nice + busy.system + busy.irq + busy.softirq + busy.steal,
        bench=bench.user + bench.system,
        measured=measured.cpu_s(),
        waiting=sum(engine.cpu_s() for engine in waiting),
    )


def between(before: ProcessorTimes, after: ProcessorTimes) -> Interference:
    elapsed_s = after.clock - before.clock
    waiting = after.waiting - before.waiting
    own = waiting + after.bench - before.bench + after.measured - before.measured
    foreign = after.all_processes - before.all_processes - own
    # The kernel counts in ticks of 10 ms.
    return Interference(waiting_cores=waiting / elapsed_s, foreign_cores=max(0.0, foreign / elapsed_s))
