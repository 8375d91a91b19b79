"""How much of the machine others used while something was measured: ranks that wait for each other feel all of it."""

import os
import time
from dataclasses import dataclass

import psutil

# A figure taken beside more is not one of this machine.
MAX_CORES = 0.1


@dataclass(frozen=True, slots=True)
class ProcessorTimes:
    """Seconds so far: the clock, all processes, and this one with those that it has started and seen end."""

    clock: float
    everybody: float
    own: float


def processor_times() -> ProcessorTimes:
    busy, own = psutil.cpu_times(), os.times()
    return ProcessorTimes(
        clock=time.perf_counter(),
        # Time stolen by the machine's other guests is lost like what other processes take.
        everybody=busy.user + busy.nice + busy.system + busy.irq + busy.softirq + busy.steal,
        own=own.user + own.system + own.children_user + own.children_system,
    )


def other_cores(before: ProcessorTimes, after: ProcessorTimes) -> float:
    """Cores that others kept busy on average. What this process started meanwhile must have ended."""
    used = (after.everybody - before.everybody) - (after.own - before.own)
    # The kernel counts in ticks of 10 ms.
    return max(0.0, used / (after.clock - before.clock))
