"""How fast a model could run on a machine: the larger of arithmetic / GEMM rate and bytes / memory bandwidth.

Only what no engine can avoid is counted: each weight read once a step, each cached key and value once a sequence,
the multiplications of the linear layers and of causal attention. https://doi.org/10.1145/1498765.1498785
"""

from dataclasses import dataclass

from engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do, measured. Bytes read and floating-point operations, per second."""

    bandwidth_bytes_per_s: float
    gemm_flops_per_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What computing some tokens takes."""

    num_tokens: int
    flops: float
    num_bytes: float

    def tokens_per_s(self, limits: Limits) -> float:
        """No engine can be faster."""
        return self.num_tokens / max(
            self.flops / limits.gemm_flops_per_s, self.num_bytes / limits.bandwidth_bytes_per_s
        )


def layer_parameters(config: ModelConfig) -> int:
    """Weights of the linear layers of all decoder layers. Norms and biases are too small to count."""
    attention = 2 * config.num_heads * config.head_dim + 2 * config.num_kv_heads * config.head_dim
    return config.num_layers * config.hidden_size * (attention + 3 * config.intermediate_size)


def lm_head_parameters(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def prefill_work(config: ModelConfig, num_tokens: int, bytes_per_value: int) -> Work:
    """One prompt, and logits for its last row."""
    # Token i attends to i others: n² / 2 pairs, twice (scores, values), 2 operations each.
    attention = 2 * num_tokens**2 * config.num_layers * config.num_heads * config.head_dim
    lm_head = lm_head_parameters(config)
    return Work(
        num_tokens=num_tokens,
        flops=2 * layer_parameters(config) * num_tokens + attention + 2 * lm_head,
        num_bytes=(layer_parameters(config) + lm_head) * bytes_per_value,
    )


def decode_work(config: ModelConfig, num_sequences: int, context: float, bytes_per_value: int) -> Work:
    """One step of `num_sequences`, which have `context` tokens each, the new one included."""
    weights = layer_parameters(config) + lm_head_parameters(config)
    cached = num_sequences * context * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    attention = num_sequences * context * 4 * config.num_layers * config.num_heads * config.head_dim
    return Work(
        num_tokens=num_sequences,
        flops=2 * weights * num_sequences + attention,
        num_bytes=(weights + cached) * bytes_per_value,
    )
