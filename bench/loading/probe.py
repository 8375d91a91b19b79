"""One load and a few tokens, in a process of its own: run by bench/loading/measure.py, as `ours` or `transformers`.

Prints seconds, bytes and the tokens as JSON.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Short: what it takes to compute a prompt is measured elsewhere.
_PROMPT = tuple(range(100, 104))
_NUM_TOKENS = 24


def ours(model: str, threads: int, options: Sequence[str]) -> dict[str, object]:
    """Args:
    options: --max-memory and --offload-dir, or nothing.
    """
    import torch

    from engine.api import EngineRequest
    from engine.assembly import assemble
    from engine.config import EngineConfig
    from engine.loader import load_model
    from engine.request import Request
    from pdmesh.sampling import SamplingParams

    torch.set_num_threads(threads)
    config = EngineConfig(
        model=model, dtype="bfloat16", device="cpu", num_threads=threads, kv_cache_bytes=64 << 20,
        max_memory=options[0] if options else None, offload_dir=options[1] if options else None,
    )  # fmt: skip
    began = time.monotonic()
    core = assemble(config, load_model, lambda done, total: None).core
    loaded = time.monotonic()
    # What was packed and then written does not lie in memory at once.
    peak_bytes = _peak_bytes()
    request = Request(EngineRequest("r", _PROMPT, SamplingParams(temperature=0.0, max_tokens=_NUM_TOKENS)))
    core.scheduler.add(request)
    times = []
    while not request.finished:
        core.step()
        times.append(time.monotonic())
    return {
        "load_s": loaded - began,
        "first_token_s": times[0] - began,
        # Behind the steps in which pages and caches come to be.
        "step_s": (times[-1] - times[3]) / (len(times) - 4),
        "peak_bytes": peak_bytes,
        "resident_bytes": _resident_bytes(),
        "tokens": list(request.token_ids[len(_PROMPT) :]),
    }


def transformers(model: str, threads: int) -> dict[str, object]:
    import accelerate
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama

    assert accelerate.__version__
    assert modeling_llama.LlamaForCausalLM
    torch.set_num_threads(threads)
    began = time.monotonic()
    loaded_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map="cpu")
    loaded = time.monotonic()
    with torch.inference_mode():
        logits = loaded_model(torch.tensor([_PROMPT]), logits_to_keep=1).logits
    first_token = time.monotonic()
    return {
        "load_s": loaded - began,
        "first_token_s": first_token - began,
        "peak_bytes": _peak_bytes(),
        "tokens": [int(logits[0, -1].argmax())],
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    way, name, num_threads, *rest = sys.argv[1:]
    figures = ours(name, int(num_threads), rest) if way == "ours" else transformers(name, int(num_threads))
    print(json.dumps(figures))
