"""Rank 0, as the runner sees it: a step of the whole group."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Batch
from engine.parallel.exchange import GroupDownError
from engine.parallel.rank import Rank
from engine.parallel.wire import Loaded, Serve, Wire, pack_batch
from pdmesh.errors import ConfigError

_T = TypeVar("_T")


class Leader:
    """Implements StepExecutor. What fails in the middle of a step leaves the ranks apart: it ends the group.

    Args:
        rank: Of this process.
        followers: All other ranks.
    """

    def __init__(self, rank: Rank, followers: Sequence[Wire]) -> None:
        self._rank = rank
        self._followers = followers
        # The step's calls for logits, and how many of them were made.
        self._logit_rows: tuple[npt.NDArray[np.int64], ...] = ()
        self._num_calls = 0

    def run(self, batch: Batch) -> None:
        # The others make all calls that a step announced, also where the leader's sampling failed between two of them.
        while self._num_calls < len(self._logit_rows):
            self.logits(self._num_calls)
        packed = pack_batch(batch)
        for follower in self._followers:
            follower.send_batch(packed)
        self._logit_rows, self._num_calls = batch.logit_rows, 0
        _together(lambda: self._rank.run(batch))

    def logits(self, index: int) -> torch.Tensor:
        assert index == self._num_calls, "the other ranks make these calls in order, each once"
        self._num_calls += 1
        logits = _together(lambda: self._rank.logits(self._logit_rows[index]))
        assert logits is not None
        return logits


def agree(own: Loaded, followers: Sequence[Wire]) -> tuple[Serve, list[Loaded]]:
    """Has all ranks serve as many blocks as every one of them has room for. Returns what the followers said, too.

    Raises ConfigError where they have not the same model, GroupDownError where one of them is lost.
    """
    said = []
    for wire in followers:
        loaded = wire.receive()
        if not isinstance(loaded, Loaded):
            raise GroupDownError(f"{wire.peer} ended before its part of the model was loaded: see its log for why")
        if loaded.digest != own.digest:
            raise ConfigError(f"{wire.peer} has another model under this name: give all nodes the same files")
        if loaded.on_kernels != own.on_kernels:
            raise ConfigError(
                f"{wire.peer} and rank 0 differ in whether they have the CPU kernels: install a C++ compiler on both "
                "nodes, or give --kernels torch"
            )
        said.append(loaded)
    everybody = (own, *said)
    serve = Serve(min(rank.max_blocks for rank in everybody), min(rank.max_model_len for rank in everybody))
    for wire in followers:
        wire.send(serve)
    return serve, said


def _together(work: Callable[[], _T]) -> _T:
    try:
        return work()
    except GroupDownError:
        raise
    except Exception as error:
        raise GroupDownError(f"rank 0 failed in a step: {type(error).__name__}: {error}") from error
