"""A process that leads a group of ranks, or is an engine alone, and decodes: run by groups.py, told by JSON lines.

(started)          ─▶  {"before_bytes": …, "ranks": [{"pid": …, "weight_bytes": …, "kv_bytes": …}, …]}
{"running": n}     ─▶  {}               n requests decode
{"steps": n}       ─▶  {"seconds": …}   n steps of all of them are over
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch

from bench.engine.decoding import start_decoding
from bench.parallel.proc import memory_of
from engine.assembly import Assembly, assemble
from engine.config import EngineConfig
from engine.loader import load_model
from engine.parallel.spawn import spawned_group


@dataclass(frozen=True, slots=True)
class Leading:
    """What such a process is to do. Every rank computes with one thread.

    Attributes:
        tp: Ranks of the group; 0 for an engine that is in none.
        model: Directory.
        prompt_tokens: Of each request.
        num_blocks: Of the KV cache.
        max_len: Tokens at which a request ends.
    """

    tp: int
    model: str
    dtype: str
    prompt_tokens: int
    max_num_seqs: int
    num_blocks: int
    max_len: int

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(
            model=self.model,
            dtype=self.dtype,
            device="cpu",
            num_threads=1,
            num_blocks=self.num_blocks,
            max_model_len=self.max_len,
            max_num_seqs=self.max_num_seqs,
        )


def main() -> None:
    leading = Leading(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    before_bytes = memory_of(os.getpid()).resident
    with ExitStack() as stack:
        group = stack.enter_context(spawned_group(leading.config, tp=leading.tp)) if leading.tp else None
        assembly = assemble(leading.config, load_model, lambda done, total: None, group=group)
        _say({"before_bytes": before_bytes, "ranks": [asdict(rank) for rank in assembly.ranks]})
        for line in sys.stdin:
            _say(_do(json.loads(line), assembly, leading.prompt_tokens))


def _do(order: dict[str, int], assembly: Assembly, prompt_tokens: int) -> dict[str, float]:
    if "running" in order:
        start_decoding(assembly, num_running=order["running"], prompt_tokens=prompt_tokens)
        return {}
    began = time.perf_counter()
    for _ in range(order["steps"]):
        assembly.core.step()
    seconds = time.perf_counter() - began
    assembly.core.scheduler.drain_block_events()
    return {"seconds": seconds}


def _say(reply: Mapping[str, object]) -> None:
    print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
