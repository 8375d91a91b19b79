"""The exchange of ranks by torch.distributed: Gloo between hosts, NCCL between GPUs.

A collective that waits for a rank that is lost ends when that rank's process does; the supervisors of the group see to
it that it does, within a second or two (pdmesh/ranks).
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from engine.parallel.exchange import GroupDownError
from engine.parallel.shard import Shard
from engine.parallel.store import open_store
from pdmesh.ranks.place import RankPlace

# Nobody learns anything by this running out: see the module. A group may be idle for as long as it likes.
_TIMEOUT: Final = timedelta(days=1)
_LEADER: Final = 0
# Of messages that nobody sends; all others have 0.
_NO_TAG: Final = 1


class DistributedExchange:
    """Implements Exchange. All ranks make theirs together.

    Args:
        dtype: Of hidden states.
        device: Where tensors are; NCCL where it is CUDA.

    Raises GroupDownError where another rank is lost meanwhile.
    """

    def __init__(
        self,
        place: RankPlace,
        shard: Shard,
        *,
        hidden_size: int,
        vocab_sizes: list[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shard = shard
        self._hidden_size = hidden_size
        self._vocab_sizes = vocab_sizes
        self._dtype = dtype
        self._device = device
        self._given_up = ""
        with self._lost():
            # Kept: torch holds on to it without Python's knowing.
            self._store = open_store(place)
            self._everybody = self._group("group", self._store, place.rank, place.size, place.host)
            self._stage = self._group(f"stage{shard.pp_rank}", self._store, shard.tp_rank, shard.tp_size, place.host)
        # Each with another rank of it.
        self._groups = [(self._everybody, 1 if place.rank == _LEADER else _LEADER)]
        if shard.tp_size > 1:
            self._groups.append((self._stage, 0 if shard.tp_rank else 1))
        self._sent: list[Any] = []

    def _group(self, name: str, store: Store, rank: int, size: int, host: str) -> Any:
        own = PrefixStore(name, store)
        if self._device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = _TIMEOUT
            return dist.ProcessGroupNCCL(own, rank, size, nccl)
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        # By this machine's name Gloo might take an interface that the others do not reach.
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = _TIMEOUT
        return ProcessGroupGloo(own, rank, size, options)

    def give_up(self, reason: str) -> None:
        self._given_up = reason
        for group, other in self._groups:
            if self._device.type == "cuda":
                group.abort()
                continue
            # Gloo cannot be told to stop waiting. But an operation that times out takes its group's others with it.
            with contextlib.suppress(RuntimeError):
                group.recv([torch.empty(1)], other, _NO_TAG).wait(timedelta(milliseconds=1))

    def begin_step(self) -> None:
        """Every message is its own sign."""

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        if self._shard.tp_size > 1:
            with self._lost():
                self._stage.allreduce([partial]).wait()
        return partial

    def receive_hidden(self, rows: slice) -> torch.Tensor | None:
        if self._shard.first_stage:
            return None
        hidden = torch.empty(rows.stop - rows.start, self._hidden_size, dtype=self._dtype, device=self._device)
        self._receive(hidden, self._shard.pp_rank - 1)
        return hidden

    def send_hidden(self, rows: slice, hidden: torch.Tensor) -> None:
        # Each rank to its like of the next stage. The executor uses its memory again before this has left.
        hidden = hidden.clone()
        with self._lost():
            work = self._everybody.send([hidden], self._rank_of(self._shard.pp_rank + 1, self._shard.tp_rank), 0)
        self._sent.append((work, hidden))

    def end_step(self) -> None:
        with self._lost():
            for work, _ in self._sent:
                work.wait()
        self._sent.clear()
        if self._shard.pp_size == 1 or self._shard.tp_rank:
            return
        # A word from the last stage, whose ranks have added up their last sum together.
        ended = torch.ones(1, device=self._device)
        if self._shard.last_stage:
            self._send(ended)
        elif self._shard.first_stage:
            self._receive(ended, self._shard.pp_size - 1)

    def logits_place(self, num_rows: int) -> torch.Tensor | None:
        return None

    def gather_logits(self, num_rows: int, logits: torch.Tensor | None) -> torch.Tensor | None:
        if not (self._shard.first_stage and self._shard.tp_rank == 0):
            if logits is not None:
                self._send(logits)
            return None
        parts = []
        for tp_rank, vocab_size in enumerate(self._vocab_sizes):
            if tp_rank == 0 and logits is not None:
                parts.append(logits)
                continue
            part = torch.empty(num_rows, vocab_size, device=self._device)
            self._receive(part, self._shard.pp_size - 1, tp_rank)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def _rank_of(self, stage: int, tp_rank: int) -> int:
        return stage * self._shard.tp_size + tp_rank

    def _send(self, values: torch.Tensor) -> None:
        """To the leader."""
        with self._lost():
            self._everybody.send([values.contiguous()], _LEADER, 0).wait()

    def _receive(self, values: torch.Tensor, stage: int, tp_rank: int | None = None) -> None:
        rank = self._rank_of(stage, self._shard.tp_rank if tp_rank is None else tp_rank)
        with self._lost():
            self._everybody.recv([values], rank, 0).wait()

    @contextmanager
    def _lost(self) -> Iterator[None]:
        """What torch.distributed raises means that a rank is not there any more, or that the group was given up."""
        try:
            yield
        except RuntimeError as error:
            raise GroupDownError(self._given_up or f"the ranks lost each other: {error}") from error
