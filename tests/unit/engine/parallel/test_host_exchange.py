"""What ranks of one host exchange over shared memory: each rank a thread here, with a mapping of its own."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch

from bench.engine.random_llama import TINY
from engine.cpu.build import kernels_path, this_target
from engine.cpu.library import Meetings
from engine.model_config import ModelConfig
from engine.parallel.exchange import GroupDownError
from engine.parallel.host_exchange import ExchangeSizes, HostExchange
from engine.parallel.shard import Shard, shard_of
from pdmesh.kv_memory import memory_file

_T = TypeVar("_T")

SIZES = ExchangeSizes(max_tokens=8, hidden_size=40, vocab_size=TINY.vocab_size, max_logit_rows=4)


@dataclass(frozen=True)
class End:
    """One rank's."""

    rank: int
    shard: Shard
    exchange: HostExchange


class Ends:
    """Ranks of a group, each on a thread of its own."""

    def __init__(self, tp: int, pp: int, config: ModelConfig = TINY) -> None:
        kernels = kernels_path(this_target())
        self._descriptor = memory_file()
        shards = [shard_of(config, tp=tp, pp=pp, rank=rank) for rank in range(tp * pp)]
        self.ends = [
            End(rank, shard, HostExchange(self._descriptor, Meetings(kernels), shard, SIZES))
            for rank, shard in enumerate(shards)
        ]
        self._threads = ThreadPoolExecutor(len(shards))

    def start(self, rank: int, work: Callable[[End], _T]) -> "Future[_T]":
        return self._threads.submit(work, self.ends[rank])

    def all(self, work: Callable[[End], _T]) -> list[_T]:
        """What each rank's work returns, by rank."""
        running = [self.start(end.rank, work) for end in self.ends]
        return [future.result(60.0) for future in running]

    def close(self) -> None:
        # Who still waits would keep the threads.
        self.ends[0].exchange.give_up("the test is over")
        self._threads.shutdown()
        os.close(self._descriptor)


@contextmanager
def group(tp: int = 1, pp: int = 1) -> Iterator[Ends]:
    ends = Ends(tp, pp)
    try:
        yield ends
    finally:
        ends.close()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_sums_are_those_in_the_order_of_the_ranks_on_every_rank(tp: int) -> None:
    num_rounds = 2000

    def partial(number: int, rank: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1000 * number + rank)
        # Of magnitudes so unlike that another order would round otherwise.
        values = torch.randn(1 + number % SIZES.max_tokens, SIZES.hidden_size, generator=draw)
        return values * 10.0 ** ((number + rank) % 7)

    def reduce(end: End) -> list[torch.Tensor]:
        return [end.exchange.all_reduce(partial(number, end.rank)) for number in range(num_rounds)]

    with group(tp=tp) as ends:
        of_ranks = ends.all(reduce)
    for number in range(num_rounds):
        expected = partial(number, 0)
        for rank in range(1, tp):
            expected = expected + partial(number, rank)
        for sums in of_ranks:
            assert torch.equal(sums[number], expected), f"round {number}"


def test_a_sum_of_more_values_than_a_place_holds() -> None:
    num_values = 3 * SIZES.max_tokens * SIZES.hidden_size + 5

    def reduce(end: End) -> list[torch.Tensor]:
        return [end.exchange.all_reduce(torch.arange(num_values) * (end.rank + float(n))) for n in range(50)]

    with group(tp=2) as ends:
        for sums in ends.all(reduce):
            for number, total in enumerate(sums):
                assert torch.equal(total, torch.arange(num_values) * (2 * number + 1.0))


def test_bfloat16_is_summed_in_float32() -> None:
    def reduce(end: End) -> torch.Tensor:
        # 256 + 1 + 1: rounded to bfloat16 after each sum it would stay 256.
        return end.exchange.all_reduce(torch.full((2, 40), 256.0 if end.rank == 0 else 1.0, dtype=torch.bfloat16))

    with group(tp=4) as ends:
        for total in ends.all(reduce):
            assert total.dtype == torch.bfloat16
            assert (total == 260.0).all()


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (1, 3)])
def test_steps_with_several_calls_for_logits(tp: int, pp: int) -> None:
    """The leader overwrites what it got, as sampling does, while the others go on to the next call, or step."""
    num_steps = 300

    def rows_of(step: int) -> list[slice]:
        return [slice(0, 3), slice(3, 8)] if step % 3 else [slice(0, 8)]

    def hidden_of(step: int, stage: int) -> torch.Tensor:
        return torch.arange(8 * 40.0).view(8, 40) + 1000.0 * step + 0.5 * stage

    def logits_of(step: int, call: int, num_rows: int) -> torch.Tensor:
        columns = torch.arange(SIZES.vocab_size, dtype=torch.float32)
        return columns + 10_000.0 * step + 1e-1 * call + torch.arange(num_rows).unsqueeze(1)

    def serve(end: End) -> None:
        shard, exchange = end.shard, end.exchange
        for step in range(num_steps):
            exchange.begin_step()
            for rows in rows_of(step):
                received = exchange.receive_hidden(rows)
                assert (received is None) == shard.first_stage
                if received is not None:
                    assert torch.equal(received, hidden_of(step, shard.pp_rank - 1)[rows]), f"step {step}"
                # Every stage ends with a sum.
                exchange.all_reduce(torch.zeros(rows.stop - rows.start, 40))
                if not shard.last_stage:
                    exchange.send_hidden(rows, hidden_of(step, shard.pp_rank)[rows])
            exchange.end_step()
            for call in range(step % 4):
                num_rows = 1 + (step + call) % SIZES.max_logit_rows
                own = None
                if shard.last_stage:
                    own = exchange.logits_place(num_rows)
                    assert own is not None
                    own.copy_(logits_of(step, call, num_rows)[:, shard.vocab.start : shard.vocab.stop])
                logits = exchange.gather_logits(num_rows, own)
                assert (logits is None) == (end.rank > 0)
                if logits is not None:
                    assert torch.equal(logits, logits_of(step, call, num_rows)), f"step {step}, call {call}"
                    logits.fill_(torch.nan)

    with group(tp=tp, pp=pp) as ends:
        ends.all(serve)


def test_the_leader_ends_a_step_after_the_last_stage() -> None:
    with group(pp=2) as ends:
        leader = ends.start(0, lambda end: end.exchange.end_step())
        time.sleep(0.05)
        assert not leader.done()
        ends.start(1, lambda end: end.exchange.end_step()).result(5.0)
        leader.result(5.0)


def _second_place(end: End) -> None:
    """A follower whose first logits nobody has read."""
    own = end.exchange.logits_place(1)
    end.exchange.gather_logits(1, own)
    end.exchange.logits_place(1)


WAITS: dict[str, tuple[int, int, int, Callable[[End], object]]] = {
    "a sum": (2, 1, 1, lambda end: end.exchange.all_reduce(torch.zeros(3, 40))),
    "hidden states": (1, 2, 1, lambda end: end.exchange.receive_hidden(slice(0, 3))),
    "the end of a step": (1, 2, 0, lambda end: end.exchange.end_step()),
    "logits": (2, 1, 0, lambda end: end.exchange.gather_logits(1, end.exchange.logits_place(1))),
    "room for logits": (2, 1, 1, _second_place),
}


@pytest.mark.parametrize(("tp", "pp", "rank", "wait"), WAITS.values(), ids=WAITS.keys())
@pytest.mark.parametrize("by", ["itself", "another"])
def test_giving_up_ends_every_kind_of_waiting(
    tp: int, pp: int, rank: int, wait: Callable[[End], object], by: str
) -> None:
    with group(tp=tp, pp=pp) as ends:
        waiting = ends.start(rank, wait)
        time.sleep(0.05)
        assert not waiting.done()
        start = time.monotonic()
        # From any thread; of the processes, only the one that was told knows why.
        ends.ends[rank if by == "itself" else 1 - rank].exchange.give_up("rank 7 was lost")
        with pytest.raises(GroupDownError) as caught:
            waiting.result(5.0)
        assert time.monotonic() - start < 0.1
        assert caught.value.message == ("rank 7 was lost" if by == "itself" else "the group of ranks was given up")
        # And from now on.
        with pytest.raises(GroupDownError):
            ends.start(rank, wait).result(5.0)
