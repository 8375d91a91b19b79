"""A family of models: what its checkpoints call it and their tensors, and how its config is read.

What config files say of any decoder is read here; a family completes it with what its own layers are made of.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from engine.config_fields import Fields
from engine.model_config import LayersConfig, ModelConfig
from engine.rope import MAX_POSITION
from engine.weights.tensor_names import SAME_NAMES, TensorNames
from pdmesh.errors import ConfigError

# Far beyond any model there is, and small enough that products of two of them are sizes and not overflows.
_MAX_VOCAB_SIZE = 2**22
MAX_HIDDEN_SIZE = 2**18
MAX_INTERMEDIATE_SIZE = 2**20
_MAX_LAYERS = 1024
# Fields of a model of more than text that are not the text model's alone.
_OF_WHOLE = ("eos_token_id", "tie_word_embeddings", "quantization_config")
_MAX_HEADS = 1024
MAX_HEAD_DIM = 1024


@dataclass(frozen=True, slots=True)
class GgufTensorFacts:
    """What a GGUF file says by its tensors instead of by metadata.

    Attributes:
        has_rope_factors: It holds the tensors of longrope scaling.
    """

    vocab_size: int
    has_output: bool
    has_attention_bias: bool
    has_mlp_bias: bool
    has_rope_factors: bool = False
    rope_freqs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """A family as GGUF files have it.

    Attributes:
        name: The architecture's, and what its metadata's names begin with.
        complete: From the metadata whose names begin so, without that, and what all models have: the whole config.
        layer_names: Of a layer's modules that other families have not, or call otherwise: GGUF's name to Hugging
            Face's.
        names: How a model's tensors are named and laid out, by Hugging Face's names.
        interleaved: The halves of each head's rows of q and k alternate, as llama.cpp turns neighbouring dimensions
            together; else they lie as in Hugging Face checkpoints.
    """

    name: str
    complete: Callable[[Fields, GgufTensorFacts, ModelConfig], ModelConfig]
    layer_names: Mapping[str, str] = field(default_factory=dict)
    names: TensorNames = SAME_NAMES
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """Models of one architecture.

    Attributes:
        architecture: As config.json names it.
        complete: From config.json and what all models have: the whole config. Raises ConfigError.
        defaults: Fields that config.json may leave out, with the values that transformers takes then.
        field_names: Fields that the family may call otherwise: the usual name to its own.
        intermediate_ratio: The MLP's columns by the hidden size, where config.json may leave them out.
        names: How checkpoints name and lay out tensors.
        gguf: None: not read from GGUF files.
        text_group: The field of config.json that holds the text model's, of a model of more than text.
    """

    architecture: str
    complete: Callable[[Fields, ModelConfig], ModelConfig]
    defaults: Mapping[str, object] = field(default_factory=dict)
    field_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    intermediate_ratio: int | None = None
    names: TensorNames = SAME_NAMES
    gguf: GgufFamily | None = None
    text_group: str | None = None


def read_hf(family: Family, fields: Fields, generation_fields: Fields, name: str) -> ModelConfig:
    """From config.json and generation_config.json (no fields where there is none).

    Raises ConfigError for a field that is missing or makes no sense.
    """
    if family.text_group is not None:
        fields = _of_text(fields, family.text_group)
    fields = replace(fields, values={**family.defaults, **fields.values}, names=family.field_names)
    if fields.has("quantization_config"):
        fields.refuse(
            "quantization_config", "quantised safetensors are not supported; take the original or a GGUF file"
        )
    hidden_size = fields.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_heads = fields.integer("num_attention_heads", 1, _MAX_HEADS)
    num_kv_heads = fields.integer("num_key_value_heads", 1, _MAX_HEADS, num_heads)
    if num_heads % num_kv_heads:
        fields.refuse("num_key_value_heads", f"must divide num_attention_heads, {num_heads}")
    vocab_size = fields.integer("vocab_size", 1, _MAX_VOCAB_SIZE)
    usual_columns = None if family.intermediate_ratio is None else family.intermediate_ratio * hidden_size
    eos_fields = generation_fields if generation_fields.has("eos_token_id") else fields
    config = ModelConfig(
        name=name,
        architecture=family.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_INTERMEDIATE_SIZE, usual_columns),
        num_layers=fields.integer("num_hidden_layers", 1, _MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, "head_dim", hidden_size, num_heads),
        max_position=fields.integer("max_position_embeddings", 1, MAX_POSITION, 2048),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        eos_token_ids=_token_ids(eos_fields, "eos_token_id", vocab_size),
        bos_token_id=_token_id(fields, "bos_token_id", vocab_size),
        layers=LayersConfig(),
    )
    return family.complete(fields, config)


def _of_text(fields: Fields, group: str) -> Fields:
    """The text model's, and what is said of the whole."""
    of_text = fields.group(group)
    if of_text is None:
        fields.refuse(group, "must hold the text model's fields")
    of_whole = {name: fields.values[name] for name in _OF_WHOLE if fields.has(name)}
    return replace(of_text, values={**of_text.values, **of_whole})


def read_gguf(family: Family, metadata: Fields, facts: GgufTensorFacts, name: str) -> ModelConfig:
    """From a GGUF file's scalar metadata and `facts`. Raises ConfigError as `read_hf` does."""
    gguf = family.gguf
    assert gguf is not None
    fields = metadata.under(f"{gguf.name}.")
    if fields.integer("expert_count", 0, 2**16, 0):
        fields.refuse("expert_count", "mixtures of experts are not supported")
    hidden_size = fields.integer("embedding_length", 1, MAX_HIDDEN_SIZE)
    num_heads = fields.integer("attention.head_count", 1, _MAX_HEADS)
    num_kv_heads = fields.integer("attention.head_count_kv", 1, _MAX_HEADS, num_heads)
    if num_heads % num_kv_heads:
        fields.refuse("attention.head_count_kv", f"must divide {gguf.name}.attention.head_count, {num_heads}")
    head_dim = _head_dim(fields, "attention.key_length", hidden_size, num_heads)
    if fields.integer("attention.value_length", 1, MAX_HEAD_DIM, head_dim) != head_dim:
        fields.refuse("attention.value_length", f"must equal the head dimension, {head_dim}")
    if facts.rope_freqs and len(facts.rope_freqs) != head_dim // 2:
        raise ConfigError(
            f"{fields.where}: rope_freqs.weight has {len(facts.rope_freqs)} values: must be {head_dim // 2}"
        )
    if not all(factor > 0 for factor in facts.rope_freqs):
        raise ConfigError(f"{fields.where}: rope_freqs.weight holds values that are not above 0: get the file anew")
    if facts.has_rope_factors:
        raise ConfigError(
            f"{fields.where}: longrope scaling is not supported in GGUF files: take the model's Hugging Face directory"
        )
    vocab_size = fields.integer("vocab_size", 1, _MAX_VOCAB_SIZE, facts.vocab_size)
    # End of text, of turn and of message: each of them ends generation in llama.cpp too.
    ends = [_token_id(metadata, f"tokenizer.ggml.{end}_token_id", vocab_size) for end in ("eos", "eot", "eom")]
    config = ModelConfig(
        name=name,
        architecture=family.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length", 1, MAX_INTERMEDIATE_SIZE),
        num_layers=fields.integer("block_count", 1, _MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=fields.integer("context_length", 1, MAX_POSITION),
        tie_word_embeddings=not facts.has_output,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        bos_token_id=_token_id(metadata, "tokenizer.ggml.bos_token_id", vocab_size),
        layers=LayersConfig(),
    )
    config = gguf.complete(fields, facts, config)
    if 0 < fields.integer("attention.sliding_window", 0, MAX_POSITION, 0) < config.max_position and not config.windows:
        fields.refuse(
            "attention.sliding_window",
            "windows of this family are not read from GGUF files: take the model's Hugging Face directory",
        )
    return config


def _head_dim(fields: Fields, name: str, hidden_size: int, num_heads: int) -> int:
    if not fields.has(name) and hidden_size % num_heads:
        fields.refuse(name, f"must be given where {num_heads} heads do not divide the hidden size, {hidden_size}")
    head_dim = fields.integer(name, 2, MAX_HEAD_DIM, hidden_size // num_heads)
    if head_dim % 2:
        fields.refuse(name, "must be even: rotary embedding turns pairs of dimensions")
    return head_dim


def _token_id(fields: Fields, name: str, vocab_size: int) -> int | None:
    return fields.integer(name, 0, vocab_size - 1) if fields.has(name) else None


def _token_ids(fields: Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    """One id, a list of them, or none."""
    value = fields.value(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            fields.refuse(name, f"must be token ids below {vocab_size}")
    return tuple(ids)
