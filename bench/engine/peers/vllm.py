"""vLLM: its engine stepped by hand, compiled, prefix caching off, nothing detokenised."""

import itertools
import time

import vllm  # type: ignore[import-not-found,unused-ignore]

from bench.engine.peers.adapter import LoadRequest, Sequence, serve


class Vllm:
    def __init__(self, request: LoadRequest) -> None:
        self._engine = vllm.LLM(
            request.model,
            dtype=request.dtype,
            max_model_len=request.max_len,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        ).llm_engine
        self._numbers = itertools.count()
        self.version = f"vllm {vllm.__version__}"

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Sequence]:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        sequences: dict[str, Sequence] = {}
        began = time.perf_counter()
        for prompt in prompts:
            request_id = str(next(self._numbers))
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
            sequences[request_id] = Sequence(-1, [])
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                now = time.perf_counter() - began
                token_ids = output.outputs[0].token_ids
                arrivals_s = sequences[output.request_id].arrivals_s
                sequences[output.request_id] = Sequence(token_ids[0], arrivals_s)
                # Tokens of all steps so far come each time.
                arrivals_s.extend([now] * (len(token_ids) - len(arrivals_s)))
        return list(sequences.values())


if __name__ == "__main__":
    serve(Vllm)
