"""Sums over two ranks: ours over shared memory, and Gloo's, in turns between the same two processes, a thread each.

Run as a program it is the second of them, told the memory file that they share and the port to meet at.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import distributed as dist

from bench.parallel.models import LLAMA_1B
from engine.cpu.build import kernels_path, this_target
from engine.cpu.library import Meetings
from engine.parallel.host_exchange import ExchangeSizes, HostExchange
from engine.parallel.shard import shard_of
from pdmesh.kv_memory import memory_file

HIDDEN = LLAMA_1B.hidden_size
# float32 values: one hidden state, and up to 4 MiB.
SIZES = (HIDDEN, 8 * HIDDEN, 64 * HIDDEN, 512 * HIDDEN)
_TOKENS = max(SIZES) // HIDDEN
_TURN_VALUES = 2**21
_MAX_REPEATS = 200
_ROOT = Path(__file__).resolve().parents[2]
_EXIT_TIMEOUT_S = 30.0

Sum = Callable[[torch.Tensor], object]


def measure(rounds: int, say: Callable[[str], None]) -> dict[str, dict[int, list[float]]]:
    """Seconds of one sum in each round: of `ours` and `gloo`, by number of values.

    Raises BuildError where there is no compiler for the kernels, RuntimeError where a sum is wrong.
    """
    say("two processes meet")
    descriptor = memory_file()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    peer = subprocess.Popen(
        [sys.executable, "-m", "bench.parallel.sums", str(descriptor), str(port), str(rounds)],
        cwd=_ROOT,
        pass_fds=[descriptor],
    )
    try:
        times = _take_turns(0, descriptor, port, rounds, say)
        peer.wait(_EXIT_TIMEOUT_S)
    finally:
        peer.kill()
        peer.wait()
        os.close(descriptor)
    return times


def _take_turns(
    rank: int, descriptor: int, port: int, rounds: int, say: Callable[[str], None]
) -> dict[str, dict[int, list[float]]]:
    """The same on both ranks: every sum is also a meeting."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        sizes = ExchangeSizes(_TOKENS, HIDDEN, LLAMA_1B.vocab_size, max_logit_rows=1)
        meetings = Meetings(kernels_path(this_target()))
        exchange = HostExchange(descriptor, meetings, shard_of(LLAMA_1B, tp=2, rank=rank), sizes)
        sums: dict[str, Sum] = {"ours": exchange.all_reduce, "gloo": dist.all_reduce}
        times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in sums}
        # Round 0 warms up.
        for number in range(rounds + 1):
            say(f"sums, round {number} of {rounds}")
            for size in SIZES:
                for name in sorted(sums, reverse=bool(number % 2)):
                    seconds = _one_sum_s(sums[name], size)
                    if number:
                        times[name][size].append(seconds)
        return times
    finally:
        dist.destroy_process_group()


def _one_sum_s(sum_up: Sum, size: int) -> float:
    values = torch.ones(size)
    sum_up(values)
    if not torch.equal(values, torch.full((size,), 2.0)):
        raise RuntimeError(f"a sum of {size} values over two ranks is wrong")
    values.zero_()
    repeats = max(8, min(_MAX_REPEATS, _TURN_VALUES // size))
    began = time.perf_counter()
    for _ in range(repeats):
        sum_up(values)
    return (time.perf_counter() - began) / repeats


def main(arguments: Sequence[str]) -> None:
    descriptor, port, rounds = map(int, arguments)
    _take_turns(1, descriptor, port, rounds, lambda what: None)


if __name__ == "__main__":
    main(sys.argv[1:])
