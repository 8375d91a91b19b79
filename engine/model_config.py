"""What a model is made of, as far as the engine asks it of any model.

Read by `engine.models` from a Hugging Face config.json or from GGUF metadata, every number bounded before anything is
built from it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayersConfig:
    """What a family's own layers need beside a model's dimensions; a subclass says what that is.

    It takes part in the model's identity: frozen, and of values that JSON can hold.
    """


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only model's dimensions and constants.

    Attributes:
        name: How people call it; takes no part in its identity.
        architecture: As config.json names it; a key of `engine.models.FAMILIES`.
        max_position: Tokens that it was made for, prompt and output together.
        eos_token_ids: Any of these ends a text; may be empty.
        layers: For the family's own layers.
        windows: Of each layer: how many keys a token sees, its own among them, or None for all up to its own. Empty:
            all of them, in every layer. The KV of all tokens is kept either way.
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
    max_position: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    layers: LayersConfig
    windows: tuple[int | None, ...] = ()

    def window(self, layer: int) -> int | None:
        """Of one layer, counted from the model's first."""
        return self.windows[layer] if self.windows else None
