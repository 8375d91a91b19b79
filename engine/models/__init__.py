"""The models, one module per architecture, found by the name that checkpoints give it."""

from engine.model_config import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.models.llama import LlamaForCausalLM

ARCHITECTURES: dict[str, type[LlamaForCausalLM]] = {"LlamaForCausalLM": LlamaForCausalLM}


def build_model(config: ModelConfig) -> CausalLM:
    """A model whose parameters have shapes but no values."""
    # A reader of configs let only known architectures pass.
    return ARCHITECTURES[config.architecture](config)
