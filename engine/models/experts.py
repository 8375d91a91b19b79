"""A mixture of experts: MLPs of which each token takes a few, as a router weighs them."""

import torch
from torch import nn

from engine.decoder_config import ExpertsConfig, MlpConfig
from engine.models.mlp import MLP


class Router(nn.Module):
    """Chooses each token's experts and weighs them, in float32."""

    def __init__(self, config: ExpertsConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_per_token = config.num_per_token
        self.renormalise = config.renormalise
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and numbers of experts, [T, num_per_token] each."""
        logits = nn.functional.linear(hidden, self.weight)
        weights, experts = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(self.num_per_token, dim=-1)
        return (weights / weights.sum(-1, keepdim=True) if self.renormalise else weights), experts


class Mixture(nn.Module):
    """Some columns of every expert.

    Each expert takes its tokens at once. Their results are weighed and added in float32, in the order of the experts.
    """

    def __init__(self, config: ExpertsConfig, mlp: MlpConfig, hidden_size: int, columns: range, tp_rank: int) -> None:
        super().__init__()
        self.gate = Router(config, hidden_size)
        self.experts = nn.ModuleList(MLP(mlp, hidden_size, columns, tp_rank) for _ in range(config.num_experts))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(hidden)
        output = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for number in chosen.unique().tolist():
            rows, places = torch.where(chosen == number)
            result = self.experts[number](hidden[rows])
            output.index_add_(0, rows, result.float() * weights[rows, places].unsqueeze(-1))
        return output.to(hidden.dtype)
