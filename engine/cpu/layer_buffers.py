"""What one layer hands from operation to operation; all layers use the same memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.cpu.packed_model import PackedLayer, PackedMixture, PackedMlp
from engine.cpu.program import Program, Rows


@dataclass(frozen=True, slots=True)
class ExpertBuffers:
    """Of a mixture: the router's logits; and one row for each expert chosen of each token, expert by expert."""

    logits: Rows
    gathered: Rows
    activated: Rows
    sums: Rows

    def of_outputs(self) -> "ExpertBuffers":
        # As many rows as were chosen for these tokens: the routing says how many.
        return replace(self, logits=self.logits.of_outputs())


@dataclass(frozen=True, slots=True)
class LayerBuffers:
    """Memory that nobody writes costs nothing: what a layer does not need is there all the same.

    Attributes:
        normed: What products read of the residual.
        heads: Sums of q, k and v, where heads are needed whole.
        sums: What is normalised before it is added to the residual.
        experts: None: no layer has a mixture.
    """

    normed: Rows
    heads: Rows
    queries: Rows
    attended: Rows
    activated: Rows
    sums: Rows
    experts: ExpertBuffers | None

    def of_outputs(self) -> "LayerBuffers":
        """With what comes after attention for the wanted tokens alone."""
        return replace(
            self,
            normed=self.normed.of_outputs(),
            attended=self.attended.of_outputs(),
            activated=self.activated.of_outputs(),
            sums=self.sums.of_outputs(),
            experts=None if self.experts is None else self.experts.of_outputs(),
        )

    @staticmethod
    def of(layers: Sequence[PackedLayer], hidden_size: int, program: Program) -> "LayerBuffers":
        """For layers whose attention has one shape, and so have all their MLPs and all their mixtures."""
        mlp = next((layer.mlp for layer in layers if isinstance(layer.mlp, PackedMlp)), None)
        mixture = next((layer.mlp for layer in layers if isinstance(layer.mlp, PackedMixture)), None)
        first = layers[0]
        return LayerBuffers(
            normed=program.rows(hidden_size),
            heads=program.rows(first.qkv.n, torch.float32),
            queries=program.rows(first.output.k),
            attended=program.rows(first.output.k),
            activated=program.rows(mlp.down.k if mlp else 0),
            sums=program.rows(hidden_size, torch.float32),
            experts=None if mixture is None else _expert_buffers(mixture, hidden_size, program),
        )


def _expert_buffers(mixture: PackedMixture, hidden_size: int, program: Program) -> ExpertBuffers:
    each = mixture.num_chosen
    return ExpertBuffers(
        logits=program.rows(mixture.num_experts, torch.float32),
        gathered=program.rows(hidden_size, per_token=each),
        activated=program.rows(mixture.down.k, per_token=each),
        sums=program.rows(hidden_size, torch.float32, per_token=each),
    )
