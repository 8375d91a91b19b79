"""Brings an engine without thread and event loop to where a number of requests decode, to be stepped by hand."""

import random

import torch

from engine.api import EngineRequest
from engine.assembly import Assembly, assemble
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.loader import load_model
from engine.request import Request
from pdmesh.sampling import SamplingParams


def decoding_core(config: EngineConfig, *, num_running: int, prompt_tokens: int, num_steps: int) -> EngineCore:
    """A core in which `num_running` greedy requests decode, and will for `num_steps` steps more at least.

    The calling thread must be the one that steps it: torch keeps the number of threads by thread.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    assembly = assemble(config, load_model, lambda done, total: None)
    # Prompts are computed while earlier requests decode, which takes these some steps ahead.
    assert assembly.model.max_model_len - prompt_tokens > 2 * num_steps, "they would end while they are measured"
    start_decoding(assembly, num_running=num_running, prompt_tokens=prompt_tokens)
    return assembly.core


def start_decoding(assembly: Assembly, *, num_running: int, prompt_tokens: int) -> None:
    """Adds greedy requests, which end at the longest length only, to those of earlier calls until `num_running` decode.

    Returns when all have, for one step.
    """
    core, model = assembly.core, assembly.model
    draw = random.Random(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=model.max_model_len - prompt_tokens, ignore_eos=True)
    prompts = [tuple(draw.randrange(model.vocab_size) for _ in range(prompt_tokens)) for _ in range(num_running)]
    for number in range(core.scheduler.load().num_running, num_running):
        core.scheduler.add(Request(EngineRequest(f"decoding-{number}", prompts[number], sampling)))
    plan = core.scheduler.schedule()
    while len(plan.decodes) < num_running:
        assert not plan.empty, "a request ended before the last one decoded: give a longer max_model_len"
        core.execute(plan)
        core.scheduler.drain_block_events()
        plan = core.scheduler.schedule()
    core.execute(plan)
