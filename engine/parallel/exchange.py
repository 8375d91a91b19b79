"""What the ranks of a group give each other within a step.

Stages of a pipeline pass hidden states on; the ranks of a stage sum their partial results; the last stage's ranks give
the leader their columns of the logits. All ranks call in one order, which the step's batch determines.
"""

from typing import Protocol

import torch

from pdmesh.errors import RANK_LOST, UnavailableError


class GroupDownError(UnavailableError):
    """A rank of this process's group is lost: the engine cannot go on."""

    reason = RANK_LOST


class Exchange(Protocol):
    """One rank's end. Every method raises GroupDownError once the group was given up."""

    def begin_step(self) -> None:
        """The leader has read what came of the last step."""
        ...

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Sums over the ranks of this stage, in place."""
        ...

    def receive_hidden(self, rows: slice) -> torch.Tensor | None:
        """Hidden states [len(rows), hidden] of these rows of the step, from the stage before; None at the first."""
        ...

    def send_hidden(self, rows: slice, hidden: torch.Tensor) -> None:
        """Gives them to the next stage; nothing at the last."""
        ...

    def end_step(self) -> None:
        """At the leader, returns when every stage has computed the step."""
        ...

    def logits_place(self, num_rows: int) -> torch.Tensor | None:
        """Where this rank's columns [num_rows, its vocab] of logits are to be written; None: anywhere."""
        ...

    def gather_logits(self, num_rows: int, logits: torch.Tensor | None) -> torch.Tensor | None:
        """This rank's columns, None of a rank that has none; at the leader, returns all [num_rows, vocab].

        These are the leader's to overwrite until it next asks for any, or begins a step.
        """
        ...

    def give_up(self, reason: str) -> None:
        """Ends this rank's waiting, now and from now on, with GroupDownError(reason). From any thread."""
        ...
