"""The models, one module per family, found by the name that checkpoints give it.

family             what a family is; what config files say of any decoder
llama, …           one family each: how its config is read, and how its checkpoints name tensors
config_parts       what config files of several families say alike
decoder            the one decoder that they all are, of the parts that engine/decoder_config.py describes:
decoder_layer      the order of attention, MLP and norms
self_attention, mlp, experts, norms, positions
parallel_layers    linear maps and embeddings of which a rank holds a part
"""

from engine.config_fields import Fields
from engine.model_config import ModelConfig
from engine.models import (
    bloom,
    gemma2,
    gemma3,
    gemma3_vision,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from engine.models.causal_lm import CausalLM
from engine.models.decoder import DecoderForCausalLM
from engine.models.family import Family, GgufTensorFacts, read_gguf, read_hf
from engine.models.parallel_layers import Reduce, alone
from engine.parallel.shard import Shard, shard_of

_ALL = (
    bloom,
    gemma2,
    gemma3,
    gemma3_vision,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
FAMILIES: dict[str, Family] = {module.FAMILY.architecture: module.FAMILY for module in _ALL}
KNOWN_ARCHITECTURES = tuple(FAMILIES)
_BY_GGUF_NAME = {family.gguf.name: family for family in FAMILIES.values() if family.gguf is not None}


def build_model(config: ModelConfig, shard: Shard | None = None, reduce: Reduce = alone) -> CausalLM:
    """A model, or what `shard` is of it, whose parameters have shapes but no values.

    Args:
        reduce: Sums over the ranks that share a layer.
    """
    return DecoderForCausalLM(config, shard or shard_of(config), reduce)


def config_from_hf(fields: Fields, generation_fields: Fields, name: str) -> ModelConfig:
    """From config.json and generation_config.json (no fields where there is none).

    Raises:
        ConfigError: for an architecture that is not known, or a field that is missing or makes no sense.
    """
    named = fields.values.get("architectures")
    if not (isinstance(named, list) and len(named) == 1 and named[0] in KNOWN_ARCHITECTURES):
        fields.refuse("architectures", f"must name one of the known: {', '.join(KNOWN_ARCHITECTURES)}")
    return read_hf(FAMILIES[named[0]], fields, generation_fields, name)


def config_from_gguf(metadata: Fields, facts: GgufTensorFacts, name: str) -> ModelConfig:
    """From a GGUF file's scalar metadata and `facts`. Raises ConfigError as `config_from_hf` does."""
    architecture = metadata.text("general.architecture")
    if architecture not in _BY_GGUF_NAME:
        metadata.refuse("general.architecture", f"known are {', '.join(_BY_GGUF_NAME)}")
    return read_gguf(_BY_GGUF_NAME[architecture], metadata, facts, name)
