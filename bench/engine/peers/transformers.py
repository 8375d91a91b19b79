"""transformers' `generate`: one static batch, its default attention (SDPA) and cache."""

import time
from typing import Any

import torch
import transformers

from bench.engine.peers.adapter import LoadRequest, Sequence, serve


class Transformers:
    def __init__(self, request: LoadRequest) -> None:
        torch.set_num_threads(request.threads)
        dtype = getattr(torch, request.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(request.model, dtype=dtype)
        self._model = model.to(request.device).eval()
        # It would fill in what the call leaves open, and stop at its EOS.
        self._model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Sequence]:
        arrivals_s: list[float] = []
        began = time.perf_counter()

        def note_step(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            # On a GPU, what was sampled is there once it can be read.
            input_ids[0, -1].item()
            arrivals_s.append(time.perf_counter() - began)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        ids = torch.tensor(prompts, device=self._model.device)
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                stopping_criteria=transformers.StoppingCriteriaList([note_step]),
            )
        first_tokens = output[:, ids.shape[1]].tolist()
        return [Sequence(first_token, arrivals_s) for first_token in first_tokens]


if __name__ == "__main__":
    serve(Transformers)
