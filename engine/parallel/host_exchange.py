"""The exchange of ranks on one host: over memory that they share, without a system call while nobody has to wait long.

    words    [1 + 4 * size] lines: given up; then of each rank how often it has met its stage's others, how many
             micro-batches it has passed on, how many steps it has ended, how many calls' logits it has written or
             (the leader) read
    slots    of each stage: partial sums, see engine/cpu/kernels/group.h
    hidden   [stages - 1, max_tokens, hidden] float32: a step's rows, as each stage hands them to the next
    logits   [max_rows, vocab] float32

Nothing but the words is ever waited for. Memory is taken from the system as it is first written.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch

from engine.cpu.library import Group, Meetings
from engine.cpu.packing import padded
from engine.cpu.program import Rows, row_values
from engine.parallel.exchange import GroupDownError
from engine.parallel.shard import Shard
from pdmesh.kv_memory import map_shared

_LINE_BYTES: Final = 64
_NUM_SLOTS: Final = 3
_FLOAT_BYTES: Final = 4


class _Word(IntEnum):
    """Of each rank."""

    MET = 0
    HANDED_ON = 1
    ENDED = 2
    LOGITS = 3


@dataclass(frozen=True, slots=True)
class ExchangeSizes:
    """What a group's shared memory is to hold; all ranks come to the same.

    Attributes:
        max_tokens: Of a step.
        max_logit_rows: Of one call for logits.
    """

    max_tokens: int
    hidden_size: int
    vocab_size: int
    max_logit_rows: int


class HostExchange:
    """Implements Exchange for CPU tensors.

    Args:
        descriptor: Of a memory file that all ranks of the group have. It stays the caller's.
        shard: Of this rank.
    """

    def __init__(self, descriptor: int, meetings: Meetings, shard: Shard, sizes: ExchangeSizes) -> None:
        self._meetings = meetings
        self._shard = shard
        self._max_tokens = sizes.max_tokens
        tp, pp = shard.tp_size, shard.pp_size
        num_words = 1 + len(_Word) * tp * pp
        rank_bytes = sizes.max_tokens * row_values(sizes.hidden_size) * _FLOAT_BYTES
        stage_bytes = _NUM_SLOTS * tp * rank_bytes
        hidden_floats = (pp - 1) * sizes.max_tokens * sizes.hidden_size
        slots_at = num_words * _LINE_BYTES
        hidden_at = slots_at + pp * stage_bytes
        logits_at = hidden_at + padded(hidden_floats, 16) * _FLOAT_BYTES
        logits_floats = sizes.max_logit_rows * padded(sizes.vocab_size)
        self._memory = torch.frombuffer(
            map_shared(descriptor, logits_at + logits_floats * _FLOAT_BYTES), dtype=torch.uint8
        )
        self._address = self._memory.data_ptr()
        floats = self._memory.view(torch.float32)
        self._hidden = floats[hidden_at // _FLOAT_BYTES :][:hidden_floats].view(
            pp - 1, sizes.max_tokens, sizes.hidden_size
        )
        self._logits = floats[logits_at // _FLOAT_BYTES :].view(sizes.max_logit_rows, padded(sizes.vocab_size))
        self._vocab_size = sizes.vocab_size
        self._slots = floats[(slots_at + shard.pp_rank * stage_bytes) // _FLOAT_BYTES :]
        self._rank_floats = rank_bytes // _FLOAT_BYTES
        self.group = Group(
            given_up=self._address,
            met=self._word(shard.pp_rank, 0, _Word.MET),
            slots=self._slots.data_ptr(),
            slot_bytes=rank_bytes,
            rank=shard.tp_rank,
            size=tp,
        )
        # Since the group began: micro-batches that this rank passed on and took, steps, logits.
        self._num_handed_on = self._num_taken = self._num_steps = self._num_logits = 0
        self._reason = "the group of ranks was given up"

    def give_up(self, reason: str) -> None:
        """Ends the other ranks' waiting, too, if not with this reason."""
        self._reason = reason
        self._meetings.post(self._address, 1)

    def partial_rows(self, place: int, width: int) -> Rows:
        """See engine/cpu/llama.py."""
        row, rank = row_values(width), self._shard.tp_rank
        first = (place * self._shard.tp_size + rank) * self._rank_floats
        values = self._slots[first:][: self._max_tokens * row].view(self._max_tokens, row)
        return Rows(values, width, rank_bytes=self._rank_floats * _FLOAT_BYTES, rank=rank)

    def check(self) -> None:
        """Raises GroupDownError where the group was given up while the kernels ran."""
        if self._memory[0]:
            raise GroupDownError(self._reason)

    def begin_step(self) -> None:
        self._release_logits()

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        if self._shard.tp_size == 1:
            return partial
        # Sums are taken in float32, whatever the model computes in.
        wide = partial.float().contiguous()
        if not self._meetings.all_reduce(self.group, wide):
            self.check()
        return wide.to(partial.dtype)

    def receive_hidden(self, rows: slice) -> torch.Tensor | None:
        stage = self._shard.pp_rank - 1
        if stage < 0:
            return None
        self._num_taken += 1
        self._wait(stage, 0, _Word.HANDED_ON, self._num_taken)
        return self._hidden[stage, rows]

    def send_hidden(self, rows: slice, hidden: torch.Tensor) -> None:
        # All ranks of a stage have the same: one of them passes it on.
        if self._shard.tp_rank == 0:
            self._hidden[self._shard.pp_rank, rows] = hidden
            self._num_handed_on += 1
            self._post(_Word.HANDED_ON, self._num_handed_on)

    def end_step(self) -> None:
        self.check()
        self._num_steps += 1
        if self._shard.last_stage:
            self._post(_Word.ENDED, self._num_steps)
        elif self._is_leader:
            # Its last sum was the last stage's last: none of its ranks is behind, and every other stage was before it.
            self._wait(self._shard.pp_size - 1, 0, _Word.ENDED, self._num_steps)

    def logits_place(self, num_rows: int) -> torch.Tensor | None:
        self._release_logits()
        if not self._is_leader:
            # Those before are read.
            self._wait(0, 0, _Word.LOGITS, self._num_logits)
        vocab = self._shard.vocab
        return self._logits[:num_rows, vocab.start : vocab.stop]

    def gather_logits(self, num_rows: int, logits: torch.Tensor | None) -> torch.Tensor | None:
        # At a leader that has no columns, nobody asked for their place.
        self._release_logits()
        self._num_logits += 1
        if not self._is_leader:
            if logits is not None:
                self._post(_Word.LOGITS, self._num_logits)
            return None
        stage = self._shard.pp_size - 1
        for tp_rank in range(self._shard.tp_size):
            if (stage, tp_rank) != (0, 0):
                self._wait(stage, tp_rank, _Word.LOGITS, self._num_logits)
        return self._logits[:num_rows, : self._vocab_size]

    def _release_logits(self) -> None:
        """At the leader: the last call's are read, and their memory is the next one's."""
        if self._is_leader:
            self._post(_Word.LOGITS, self._num_logits)

    @property
    def _is_leader(self) -> bool:
        return self._shard.pp_rank == self._shard.tp_rank == 0

    def _word(self, stage: int, tp_rank: int, word: _Word) -> int:
        """Its address. Words of one kind lie side by side, a line each."""
        size = self._shard.tp_size * self._shard.pp_size
        line = 1 + word * size + stage * self._shard.tp_size + tp_rank
        return self._address + line * _LINE_BYTES

    def _post(self, word: _Word, value: int) -> None:
        self._meetings.post(self._word(self._shard.pp_rank, self._shard.tp_rank, word), value)

    def _wait(self, stage: int, tp_rank: int, word: _Word, value: int) -> None:
        if not self._meetings.wait(self._word(stage, tp_rank, word), value, self._address):
            self.check()
