"""What a decoder is made of, part by part. A family says by it which of the parts its layers have.

Every family is one decoder (engine/models/decoder.py): an embedding, layers of attention and an MLP around a residual,
a norm, an output matrix. The parts are small and frozen; those who compute, in torch or in kernels, read them alike.
"""

from dataclasses import dataclass
from typing import Literal

from engine.model_config import LayersConfig, ModelConfig
from engine.rope import RopeConfig

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Residual = Literal["pre", "post", "parallel", "sandwich"]


@dataclass(frozen=True, slots=True)
class NormConfig:
    """How a row is normalised, in float32.

    Attributes:
        kind: "rms": to unit root mean square; "layer": to mean 0 and unit variance, then times weight, plus bias.
        eps: Added to the mean square or to the variance.
        from_one: The weight is stored as what it is above 1, and multiplied in float32 (Gemma); else it is multiplied
            in the row's dtype.
    """

    kind: Literal["rms", "layer"]
    eps: float
    from_one: bool = False


@dataclass(frozen=True, slots=True)
class RotaryPositions:
    """Queries and keys turn by their positions.

    Attributes:
        tables: Ways to turn.
        of_layers: Which of `tables` each layer takes; empty: the first, in all of them.
    """

    tables: tuple[RopeConfig, ...]
    of_layers: tuple[int, ...] = ()

    def table(self, layer: int) -> int:
        """Index in `tables`, of a layer counted from the model's first."""
        return self.of_layers[layer] if self.of_layers else 0


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """Each position has a vector of its own, added to the token's.

    Attributes:
        offset: Which row of the matrix is that of position 0.
    """

    offset: int = 0


@dataclass(frozen=True, slots=True)
class AlibiPositions:
    """Each head adds to a score its slope times the distance, at most 0. https://arxiv.org/abs/2108.12409"""


Positions = RotaryPositions | LearnedPositions | AlibiPositions


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """What attention has beside its four maps.

    Attributes:
        qkv_bias: q, k and v projections have biases.
        output_bias: The o projection has one.
        qk_norm: Each head of q and k is normalised before it is turned.
        score_scale: What products of queries and keys are multiplied by; None: head_dim ** -0.5.
        soft_cap: Scores become soft_cap * tanh(score / soft_cap); None: stay as they are.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    score_scale: float | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of MLPs, of which a router chooses some for each token.

    Attributes:
        num_per_token: So many are chosen, those to which the router gives most.
        renormalise: What it gives these is divided by their sum.
        intermediate_size: Columns of each expert.
        layers: Which layers have a mixture, in place of one MLP; empty: all.
    """

    num_experts: int
    num_per_token: int
    renormalise: bool
    intermediate_size: int
    layers: tuple[bool, ...] = ()

    def in_layer(self, layer: int) -> bool:
        """Whether a layer, counted from the model's first, has the mixture."""
        return self.layers[layer] if self.layers else True


@dataclass(frozen=True, slots=True)
class MlpConfig:
    """An MLP, or each expert of a mixture.

    Attributes:
        gated: down(activation(gate(x)) * up(x)); else down(activation(up(x))).
    """

    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddingConfig:
    """What becomes of a token's vector before the first layer.

    Attributes:
        scale: It is multiplied by this, rounded to its dtype.
        norm: It is normalised.
        size: Of the vector, where a map takes it to the hidden size, and another one from there to the output matrix;
            None: it has the hidden size.
    """

    scale: float = 1.0
    norm: bool = False
    size: int | None = None


@dataclass(frozen=True, slots=True)
class DecoderLayers(LayersConfig):
    """A decoder's parts.

    Attributes:
        norm: All norms are of this kind.
        residual: Where norms lie: "pre": attention and MLP each read a norm of the residual, and are added to it;
            "post": they read the residual, which is normalised after each; "parallel": both read norms of the same
            residual; "sandwich": as "pre", and what each gives is normalised before it is added.
        experts: None: no layer has a mixture.
        final_norm: What the output matrix reads is normalised.
        logit_soft_cap: As `AttentionConfig.soft_cap`, of logits.
    """

    norm: NormConfig
    positions: Positions
    attention: AttentionConfig = AttentionConfig()
    mlp: MlpConfig = MlpConfig()
    experts: ExpertsConfig | None = None
    embedding: EmbeddingConfig = EmbeddingConfig()
    residual: Residual = "pre"
    final_norm: bool = True
    logit_soft_cap: float | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> "DecoderLayers":
        """Of a model whose config was read to the end."""
        assert isinstance(config.layers, cls), f"the layers of {config.architecture} were not read"
        return config.layers

    def score_scale(self, head_dim: int) -> float:
        """What products of queries and keys are multiplied by."""
        scale = self.attention.score_scale
        return head_dim**-0.5 if scale is None else scale

    @property
    def rope(self) -> RopeConfig:
        """The way to turn of a decoder that has one for all layers."""
        assert isinstance(self.positions, RotaryPositions)
        (rope,) = self.positions.tables
        return rope


def turns_by(rope: RopeConfig) -> RotaryPositions:
    """Positions of a decoder that turns alike in all layers."""
    return RotaryPositions((rope,))
