"""What a model is made of, read from a Hugging Face config.json or from GGUF metadata.

Every number is bounded here, before anything is built from it.
"""

from dataclasses import dataclass

from engine.config_fields import Fields
from engine.rope import MAX_POSITION, RopeConfig, rope_from_gguf, rope_from_hf
from pdmesh.errors import ConfigError

KNOWN_ARCHITECTURES = ("LlamaForCausalLM",)
# GGUF's names of them.
_GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM"}

# Far beyond any model there is, and small enough that products of two of them are sizes and not overflows.
_MAX_VOCAB_SIZE = 2**22
_MAX_HIDDEN_SIZE = 2**18
_MAX_INTERMEDIATE_SIZE = 2**20
_MAX_LAYERS = 1024
_MAX_HEADS = 1024
_MAX_HEAD_DIM = 1024


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only model's dimensions and constants.

    Attributes:
        name: How people call it; takes no part in its identity.
        attention_bias: q, k, v and o projections have biases.
        mlp_bias: gate, up and down projections have biases.
        max_position: Tokens that it was made for, prompt and output together.
        eos_token_ids: Any of these ends a text; may be empty.
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def config_from_hf(fields: Fields, generation_fields: Fields, name: str) -> ModelConfig:
    """From config.json and generation_config.json (no fields where there is none).

    Raises:
        ConfigError: for an architecture that is not known, or a field that is missing or makes no sense.
    """
    architecture = _hf_architecture(fields)
    if fields.has("quantization_config"):
        fields.refuse(
            "quantization_config", "quantised safetensors are not supported; take the original or a GGUF file"
        )
    if fields.text("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", "only silu is supported")
    hidden_size = fields.integer("hidden_size", 1, _MAX_HIDDEN_SIZE)
    num_heads = fields.integer("num_attention_heads", 1, _MAX_HEADS)
    num_kv_heads = fields.integer("num_key_value_heads", 1, _MAX_HEADS, num_heads)
    if num_heads % num_kv_heads:
        fields.refuse("num_key_value_heads", f"must divide num_attention_heads, {num_heads}")
    head_dim = _head_dim(fields, "head_dim", hidden_size, num_heads)
    vocab_size = fields.integer("vocab_size", 1, _MAX_VOCAB_SIZE)
    max_position = fields.integer("max_position_embeddings", 1, MAX_POSITION, 2048)
    eos_fields = generation_fields if generation_fields.has("eos_token_id") else fields
    return ModelConfig(
        name=name,
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, _MAX_INTERMEDIATE_SIZE),
        num_layers=fields.integer("num_hidden_layers", 1, _MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 0.1, 1e-6),
        max_position=max_position,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        rope=rope_from_hf(fields, max_position),
        eos_token_ids=_token_ids(eos_fields, "eos_token_id", vocab_size),
        bos_token_id=_token_id(fields, "bos_token_id", vocab_size),
    )


@dataclass(frozen=True, slots=True)
class GgufTensorFacts:
    """What a GGUF file says by its tensors instead of by metadata."""

    vocab_size: int
    has_output: bool
    has_attention_bias: bool
    has_mlp_bias: bool
    rope_freqs: tuple[float, ...] = ()


def config_from_gguf(fields: Fields, facts: GgufTensorFacts, name: str) -> ModelConfig:
    """From a GGUF file's scalar metadata and `facts`. Raises ConfigError as `config_from_hf` does."""
    architecture = fields.text("general.architecture")
    if architecture not in _GGUF_ARCHITECTURES:
        fields.refuse("general.architecture", f"known are {', '.join(_GGUF_ARCHITECTURES)}")
    if fields.integer("llama.expert_count", 0, 2**16, 0):
        fields.refuse("llama.expert_count", "mixtures of experts are not supported")
    hidden_size = fields.integer("llama.embedding_length", 1, _MAX_HIDDEN_SIZE)
    num_heads = fields.integer("llama.attention.head_count", 1, _MAX_HEADS)
    num_kv_heads = fields.integer("llama.attention.head_count_kv", 1, _MAX_HEADS, num_heads)
    if num_heads % num_kv_heads:
        fields.refuse("llama.attention.head_count_kv", f"must divide llama.attention.head_count, {num_heads}")
    head_dim = _head_dim(fields, "llama.attention.key_length", hidden_size, num_heads)
    for same in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.integer(same, 1, _MAX_HEAD_DIM, head_dim) != head_dim:
            fields.refuse(same, f"must equal the head dimension, {head_dim}")
    if facts.rope_freqs and len(facts.rope_freqs) != head_dim // 2:
        raise ConfigError(
            f"{fields.where}: rope_freqs.weight has {len(facts.rope_freqs)} values: must be {head_dim // 2}"
        )
    if not all(factor > 0 for factor in facts.rope_freqs):
        raise ConfigError(f"{fields.where}: rope_freqs.weight holds values that are not above 0: get the file anew")
    max_position = fields.integer("llama.context_length", 1, MAX_POSITION)
    vocab_size = fields.integer("llama.vocab_size", 1, _MAX_VOCAB_SIZE, facts.vocab_size)
    # End of text, of turn and of message: each of them ends generation in llama.cpp too.
    ends = [_token_id(fields, f"tokenizer.ggml.{end}_token_id", vocab_size) for end in ("eos", "eot", "eom")]
    return ModelConfig(
        name=name,
        architecture=_GGUF_ARCHITECTURES[architecture],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("llama.feed_forward_length", 1, _MAX_INTERMEDIATE_SIZE),
        num_layers=fields.integer("llama.block_count", 1, _MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon", 1e-12, 0.1),
        max_position=max_position,
        tie_word_embeddings=not facts.has_output,
        attention_bias=facts.has_attention_bias,
        mlp_bias=facts.has_mlp_bias,
        rope=rope_from_gguf(fields, max_position, facts.rope_freqs),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        bos_token_id=_token_id(fields, "tokenizer.ggml.bos_token_id", vocab_size),
    )


def _hf_architecture(fields: Fields) -> str:
    named = fields.values.get("architectures")
    if isinstance(named, list) and len(named) == 1 and named[0] in KNOWN_ARCHITECTURES:
        return str(named[0])
    fields.refuse("architectures", f"must name one of the known: {', '.join(KNOWN_ARCHITECTURES)}")


def _head_dim(fields: Fields, name: str, hidden_size: int, num_heads: int) -> int:
    if not fields.has(name) and hidden_size % num_heads:
        fields.refuse(name, f"must be given where {num_heads} heads do not divide the hidden size, {hidden_size}")
    head_dim = fields.integer(name, 2, _MAX_HEAD_DIM, hidden_size // num_heads)
    if head_dim % 2:
        fields.refuse(name, "must be even: rotary embedding turns pairs of dimensions")
    return head_dim


def _token_id(fields: Fields, name: str, vocab_size: int) -> int | None:
    return fields.integer(name, 0, vocab_size - 1) if fields.has(name) else None


def _token_ids(fields: Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    """One id, a list of them, or none."""
    value = fields.values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            fields.refuse(name, f"must be token ids below {vocab_size}")
    return tuple(ids)
