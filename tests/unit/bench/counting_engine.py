"""An engine of the bench that a test can run as a process: each token takes a second of a clock that it makes up."""

import os

from bench.engine.peers.adapter import LoadRequest, Sequence, serve


class CountingEngine:
    def __init__(self, request: LoadRequest) -> None:
        if request.model == "missing":
            raise FileNotFoundError("no such model")
        if request.model == "crashing":
            os._exit(1)
        self.version = f"counting {request.dtype}"

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Sequence]:
        # What a library prints must not get between the replies.
        print("generating")
        return [Sequence(index, [1.0 + step for step in range(num_tokens)]) for index in range(len(prompts))]


if __name__ == "__main__":
    serve(CountingEngine)
