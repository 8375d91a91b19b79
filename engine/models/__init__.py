"""The models, one module per architecture, found by the name that checkpoints give it."""

from engine.model_config import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.models.llama import LlamaForCausalLM
from engine.models.parallel_layers import Reduce, alone
from engine.parallel.shard import Shard, shard_of

ARCHITECTURES: dict[str, type[LlamaForCausalLM]] = {"LlamaForCausalLM": LlamaForCausalLM}


def build_model(config: ModelConfig, shard: Shard | None = None, reduce: Reduce = alone) -> CausalLM:
    """A model, or what `shard` is of it, whose parameters have shapes but no values.

    Args:
        reduce: Sums over the ranks that share a layer.
    """
    # A reader of configs let only known architectures pass.
    return ARCHITECTURES[config.architecture](config, shard or shard_of(config), reduce)
