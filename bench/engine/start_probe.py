"""From nothing to the first token, once: run by bench/engine/start.py in a fresh process.

Prints when each phase was over, in seconds of the machine's monotonic clock, which its parent reads too.
"""

import json
import sys
import time


def main(model: str, dtype: str, threads: int) -> None:
    entered = time.monotonic()
    # Imported here, for this is what is measured.
    import torch

    from engine.api import EngineRequest
    from engine.assembly import assemble
    from engine.config import EngineConfig
    from engine.loader import load_model
    from engine.request import Request
    from pdmesh.sampling import SamplingParams

    imported = time.monotonic()
    torch.set_num_threads(threads)
    config = EngineConfig(model=model, dtype=dtype, device="cpu", num_threads=threads)
    core = assemble(config, load_model, lambda done, total: None).core
    loaded = time.monotonic()
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    core.scheduler.add(Request(EngineRequest("first", tuple(range(100, 132)), sampling)))
    outputs = core.step()
    first_token = time.monotonic()
    assert len(outputs) == 1, "the first step gives the first token"
    print(json.dumps({"entered": entered, "imported": imported, "loaded": loaded, "first_token": first_token}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
