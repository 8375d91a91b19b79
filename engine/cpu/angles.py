"""By what the heads of queries and keys turn, where the kernels read it."""

import torch
from torch.nn import functional as F

from engine.cpu.library import Rotation
from engine.decoder_config import Positions, RotaryPositions
from engine.rope import RopeConfig, rotation_table

# The kernels read 16 values at once, which for the last pairs of narrow heads lie beyond a position's.
_LANES = 16


class Angles:
    """Angles of each pair of a head's dimensions, at each position or at all alike. Lives as long as programs use it.

    Args:
        cosines: [positions, head_dim / 2] float32; of one position: those of all. Pairs that turn come first.
        sines: Likewise.
        num_turned: Pairs that turn.
    """

    def __init__(self, cosines: torch.Tensor, sines: torch.Tensor, num_turned: int) -> None:
        num_positions, num_pairs = cosines.shape
        self._cosines, self._sines = (F.pad(values.flatten(), (0, _LANES)) for values in (cosines, sines))
        self.rotation = Rotation(
            cosines=self._cosines.data_ptr(),
            sines=self._sines.data_ptr(),
            stride=num_pairs if num_positions > 1 else 0,
            num_turned=num_turned,
        )

    @property
    def num_bytes(self) -> int:
        return self._cosines.nbytes + self._sines.nbytes

    @staticmethod
    def of(rope: RopeConfig, head_dim: int, num_positions: int) -> "Angles":
        """Of positions from 0 on."""
        return Angles(*rotation_table(rope, head_dim, max(2, num_positions)), rope.rotary_dim(head_dim) // 2)

    @staticmethod
    def none(head_dim: int) -> "Angles":
        """Of heads that do not turn: times 1, plus times 0."""
        return Angles(torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2), head_dim // 2)


def angles_of(positions: Positions, head_dim: int, num_positions: int) -> list[Angles]:
    """Of each way to turn; of positions that turn nothing, the one way not to."""
    if not isinstance(positions, RotaryPositions):
        return [Angles.none(head_dim)]
    return [Angles.of(rope, head_dim, num_positions) for rope in positions.tables]
