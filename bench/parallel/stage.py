"""A process that computes prompts cut into micro-batches with a whole model: told by JSON lines, run by pipeline.py.

(started)                                  ─▶  {}
{"tokens": n, "micro_batches": m}          ─▶  {"seconds": …}
"""

import json
import sys
from time import perf_counter

import torch

from bench.engine.batches import plain_batch
from engine.assembly import assemble
from engine.config import EngineConfig
from engine.executor import ModelExecutor, OneProcess
from engine.loader import load_model
from engine.parallel.batches import micro_batches
from engine.parallel.rank import MIN_MICRO_BATCH_TOKENS


def main() -> None:
    torch.set_num_threads(1)
    config = EngineConfig(**json.loads(sys.argv[1]))
    process = assemble(config, load_model, lambda done, total: None).core._runner._executor
    # As in bench/engine: the whole model, without what schedules and samples.
    assert isinstance(process, OneProcess)
    print("{}", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps({"seconds": _seconds(process._executor, order["tokens"], order["micro_batches"])}), flush=True)


@torch.inference_mode()
def _seconds(executor: ModelExecutor, num_tokens: int, num_parts: int) -> float:
    batch = plain_batch([num_tokens], [0])
    began = perf_counter()
    for _, micro_batch in micro_batches(batch, num_parts, MIN_MICRO_BATCH_TOKENS):
        hidden = executor.forward(micro_batch)
    executor.logits(hidden)
    return perf_counter() - began


if __name__ == "__main__":
    main()
