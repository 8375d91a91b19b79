"""The half of the bench's protocol that runs inside an engine's process. Standard library only: each peer's own
Python runs it, and nothing of ours is installed there.

One JSON object a line, on stdin and stdout:
    {"load": {…fields of LoadRequest}}                               -> {"ready_s": seconds, "version": "…"}
    {"prefill": tokens, "prompts": n, "seed": s}                     -> {"tokens_per_s": …, "first_tokens": […]}
    {"decode": sequences, "prompt": tokens, "tokens": n, "seed": s}  -> the same
What goes wrong is {"error": "…"}, and the process ends. It ends, too, when stdin does.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What an engine loads and how. `model`: a Hugging Face directory, or for llama.cpp a GGUF file.

    Attributes:
        max_len: Most tokens of a sequence, prompt and output.
        max_seqs: Most sequences at once.
    """

    model: str
    dtype: str
    device: str
    threads: int
    vocab_size: int
    max_len: int
    max_seqs: int


class Sequence(NamedTuple):
    """What became of one prompt: its first new token, and when each new token was there, in seconds."""

    first_token: int
    arrivals_s: list[float]


class Engine(Protocol):
    """An engine under measurement."""

    version: str

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Sequence]:
        """`num_tokens` tokens for each prompt, all prompts at once: greedy, EOS ignored, nothing cached before.

        Times are of one clock that reads 0 when the call begins.
        """
        ...


def serve(load: Callable[[LoadRequest], Engine]) -> None:
    """Answers requests from stdin until it ends. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine: Engine | None = None
    vocab_size = 0
    for request in map(json.loads, _lines()):
        try:
            if "load" in request:
                wanted = LoadRequest(**request["load"])
                began = time.perf_counter()
                engine, vocab_size = load(wanted), wanted.vocab_size
                reply: dict[str, Any] = {"ready_s": time.perf_counter() - began, "version": engine.version}
            else:
                assert engine is not None, "load comes first"
                reply = measure(engine, request, vocab_size)
        except Exception as error:
            replies.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            raise
        replies.write(json.dumps(reply) + "\n")


def _lines() -> Iterator[str]:
    yield from iter(sys.stdin.readline, "")


def measure(engine: Engine, request: dict[str, int], vocab_size: int) -> dict[str, Any]:
    """Answers {"prefill": …} and {"decode": …}. Prompts are drawn anew from the seed: the same for every engine."""
    draw = random.Random(request["seed"])
    if "prefill" in request:
        length, count = request["prefill"], request["prompts"]
        sequences = [engine.generate([prompt], 1)[0] for prompt in draw_prompts(draw, count, length, vocab_size)]
        rate = length * count / sum(sequence.arrivals_s[0] for sequence in sequences)
    else:
        prompts = draw_prompts(draw, request["decode"], request["prompt"], vocab_size)
        sequences = engine.generate(prompts, request["tokens"])
        rate = full_batch_rate([sequence.arrivals_s for sequence in sequences])
    return {"tokens_per_s": rate, "first_tokens": [sequence.first_token for sequence in sequences]}


def draw_prompts(draw: random.Random, count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Random tokens, no two prompts alike: no prefix cache has them."""
    return [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def full_batch_rate(arrivals_s: list[list[float]]) -> float:
    """Tokens per second while all sequences decode: from the last one's first token to the first one's last token.

    Engines that start some sequences earlier than others are measured like those that start all at once. Each
    sequence counts from token to token, so it matters not in which order the tokens of one step are seen.
    """
    begin = max(times[0] for times in arrivals_s)
    end = min(times[-1] for times in arrivals_s)
    rate = 0.0
    for times in arrivals_s:
        # One that is seen a moment after another of the same step loses that step, and its time with it.
        inside = [seen for seen in times if begin <= seen <= end]
        if len(inside) < 2 or inside[-1] <= inside[0]:
            raise ValueError(f"{len(inside)} tokens of a sequence came while all decode: measure more tokens")
        rate += (len(inside) - 1) / (inside[-1] - inside[0])
    return rate
