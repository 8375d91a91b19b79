"""What a prefill worker is told."""

from dataclasses import dataclass

from worker.config import WorkerConfig


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    worker: WorkerConfig
