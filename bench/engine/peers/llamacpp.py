"""llama.cpp by its C interface: `llama_decode` on batches, the argmax taken by numpy.

Flash attention is faster at some points and slower at others. There is a context with and one without, and the first
time that a point is measured decides for it.
"""

import time
from typing import Any

import llama_cpp as lib  # type: ignore[import-not-found,unused-ignore]
import numpy as np

from bench.engine.peers.adapter import LoadRequest, Sequence, serve

_FLASH_ATTENTION = (0, 1)


class LlamaCpp:
    def __init__(self, request: LoadRequest) -> None:
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(request.model.encode(), lib.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {request.model}")
        self._vocab_size = request.vocab_size
        capacity = request.max_len * request.max_seqs
        self._contexts = [self._context(request, capacity, flash) for flash in _FLASH_ATTENTION]
        self._batch = lib.llama_batch_init(capacity, 0, 1)
        # By number of prompts, their length and the tokens wanted.
        self._faster: dict[tuple[int, int, int], Any] = {}
        self.version = f"llama.cpp of llama-cpp-python {lib.__version__}"

    def _context(self, request: LoadRequest, capacity: int, flash_attention: int) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = capacity
        params.n_seq_max = request.max_seqs
        params.n_threads = params.n_threads_batch = request.threads
        params.flash_attn_type = flash_attention
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise ValueError("llama.cpp cannot make a context: is there enough memory?")
        return context

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Sequence]:
        def seconds(context: Any) -> float:
            return self._generate(context, prompts, num_tokens)[0].arrivals_s[-1]

        point = (len(prompts), len(prompts[0]), num_tokens)
        if point not in self._faster:
            self._faster[point] = min(self._contexts, key=seconds)
        return self._generate(self._faster[point], prompts, num_tokens)

    def _generate(self, context: Any, prompts: list[list[int]], num_tokens: int) -> list[Sequence]:
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        began = time.perf_counter()
        tokens = self._decode(context, prompts, 0)
        first_tokens, arrivals_s = tokens, [time.perf_counter() - began]
        for position in range(len(prompts[0]), len(prompts[0]) + num_tokens - 1):
            tokens = self._decode(context, [[token] for token in tokens], position)
            arrivals_s.append(time.perf_counter() - began)
        return [Sequence(first_token, arrivals_s) for first_token in first_tokens]

    def _decode(self, context: Any, new_tokens: list[list[int]], position: int) -> list[int]:
        """Appends tokens to each sequence at `position`, and returns the most likely next one of each."""
        batch, row = self._batch, 0
        last_rows = []
        for sequence, tokens in enumerate(new_tokens):
            for offset, token in enumerate(tokens):
                batch.token[row] = token
                batch.pos[row] = position + offset
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = offset == len(tokens) - 1
                row += 1
            last_rows.append(row - 1)
        batch.n_tokens = row
        if status := lib.llama_decode(context, batch):
            raise ValueError(f"llama_decode failed with status {status}")
        logits = (lib.llama_get_logits_ith(context, last_row) for last_row in last_rows)
        return [int(np.ctypeslib.as_array(values, (self._vocab_size,)).argmax()) for values in logits]


if __name__ == "__main__":
    serve(LlamaCpp)
