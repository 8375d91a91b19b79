"""How well a model foresees a text: by our engine, as requests see it, and by transformers."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engine.api import EngineRequest, TokenOutput
from engine.core import EngineCore
from engine.request import Request
from pdmesh.errors import MeshError
from pdmesh.sampling import SamplingParams

TEXT = Path(__file__).parent / "opticks.txt"

# Each window begins without what came before it.
WINDOW = 1024


def perplexity(core: EngineCore, token_ids: Sequence[int]) -> float:
    """By the log-probabilities of a prompt's tokens, over windows of `WINDOW` tokens."""
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    logprobs: list[float] = []
    for number, window in enumerate(_windows(token_ids)):
        request = Request(EngineRequest(f"window-{number}", window, sampling))
        core.scheduler.add(request)
        while not request.finished:
            for output in core.step():
                if isinstance(output.event, MeshError):
                    raise output.event
                if isinstance(output.event, TokenOutput):
                    logprobs += [token.logprob for token in output.event.prompt_logprobs]
    assert len(logprobs) == sum(len(window) - 1 for window in _windows(token_ids))
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def transformers_perplexity(directory: Path, token_ids: Sequence[int], num_threads: int) -> float:
    """The same by transformers, in float32."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    logprobs: list[float] = []
    with torch.inference_mode():
        for window in _windows(token_ids):
            logits = model(torch.tensor([window])).logits[0, :-1].float()
            targets = torch.tensor(window[1:])
            logprobs += (-torch.nn.functional.cross_entropy(logits, targets, reduction="none")).tolist()
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def _windows(token_ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for first in range(0, len(token_ids) - 1, WINDOW):
        yield tuple(token_ids[first : first + WINDOW])
