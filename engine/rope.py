"""Rotary position embedding: the frequencies of each scaling scheme, and their application.

Each head dimension pair i turns by position * inv_freq[i]; scaling schemes change inv_freq so that a model reads
further than it was trained to. The numbers equal those of transformers' modeling_rope_utils, operation by operation.
RoPE: https://arxiv.org/abs/2104.09864, YaRN: https://arxiv.org/abs/2309.00071,
LongRoPE: https://arxiv.org/abs/2402.13753.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from engine.config_fields import Fields

DEFAULT_THETA = 10000.0
MAX_THETA = 1e12
MAX_FACTOR = 1e6
MAX_POSITION = 2**27

_CPU = torch.device("cpu")  # named throughout: a model is built while the default device is "meta"


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN: a ramp over the dimensions between kept and divided, and `attention_factor` on cosine and sine."""

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE: each wavelength times its factor, and `attention_factor` on cosine and sine.

    `factors` are those of texts of up to `original_max_position` tokens; those of longer ones are not read.
    """

    factors: tuple[float, ...]
    original_max_position: int
    attention_factor: float


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How a model encodes positions.

    Attributes:
        theta: Base of the wavelengths.
        scaling: None: frequencies as trained.
        freq_factors: Each frequency is divided by its factor, head_dim / 2 of them (GGUF's rope_freqs tensor, in
            which converters store Llama 3 scaling); empty: none.
        num_rotary_dims: How many of a head's dimensions turn, the first ones; even. None: all.
    """

    theta: float = DEFAULT_THETA
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None = None
    freq_factors: tuple[float, ...] = ()
    num_rotary_dims: int | None = None

    def rotary_dim(self, head_dim: int) -> int:
        """How many of a head's dimensions turn; even."""
        return head_dim if self.num_rotary_dims is None else self.num_rotary_dims

    @property
    def attention_scaling(self) -> float:
        """What cosine and sine are multiplied by."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling | LongRopeScaling) else 1.0


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """[rotary_dim / 2] float32 on CPU: radians per position of each pair of dimensions that turns."""
    head_dim = rope.rotary_dim(head_dim)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=_CPU).to(torch.float32) / head_dim
    wave_numbers = rope.theta**exponents
    match rope.scaling:
        case None:
            inv_freq = 1.0 / wave_numbers
        case LinearScaling(factor=factor):
            inv_freq = 1.0 / wave_numbers / factor
        case Llama3Scaling() as scaling:
            inv_freq = _llama3(1.0 / wave_numbers, scaling)
        case YarnScaling() as scaling:
            inv_freq = _yarn(wave_numbers, rope.theta, scaling, head_dim)
        case LongRopeScaling(factors=factors):
            inv_freq = 1.0 / (torch.tensor(factors, dtype=torch.float32, device=_CPU) * wave_numbers)
    if rope.freq_factors:
        inv_freq = inv_freq / torch.tensor(rope.freq_factors, dtype=torch.float32, device=_CPU)
    return inv_freq


def _llama3(inv_freq: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    low_freq_wavelen = scaling.original_max_position / scaling.low_freq_factor
    high_freq_wavelen = scaling.original_max_position / scaling.high_freq_factor
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > low_freq_wavelen, inv_freq / scaling.factor, inv_freq)
    smooth = (scaling.original_max_position / wavelen - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smoothed = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_between = ~(wavelen < high_freq_wavelen) & ~(wavelen > low_freq_wavelen)
    return torch.where(is_between, smoothed, scaled)


def _yarn(wave_numbers: torch.Tensor, theta: float, scaling: YarnScaling, head_dim: int) -> torch.Tensor:
    def dim_of_rotations(num_rotations: float) -> float:
        """The dimension that turns `num_rotations` times over the trained context."""
        wavelen_ratio = scaling.original_max_position / (num_rotations * 2 * math.pi)
        return (head_dim * math.log(wavelen_ratio)) / (2 * math.log(theta))

    low, high = dim_of_rotations(scaling.beta_fast), dim_of_rotations(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp becomes a step
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32, device=_CPU) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * wave_numbers) * (1 - kept) + 1.0 / wave_numbers * kept


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """What YaRN recommends for `factor`; the two mscales count only together (DeepSeek)."""

    def mscaled(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    return mscaled(mscale) / mscaled(mscale_all_dim) if mscale and mscale_all_dim else mscaled(1.0)


def rope_from_hf(config: Fields, max_position: int) -> RopeConfig:
    """From config.json: `rope_parameters` (transformers 5), or `rope_scaling` beside `rope_theta` (before).

    Raises ConfigError for a scheme that is not built or values that make no sense.
    """
    parameters, theta, type_name = _hf_parameters(config)
    for holder in (config, parameters):
        if holder.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
            holder.refuse("partial_rotary_factor", "rotating a part of each head is not supported")
    return _whole_rope(config, parameters, theta, type_name, max_position)


def rope_from_parameters(parameters: Fields, max_position: int, default_theta: float) -> RopeConfig:
    """As `rope_from_hf`, of one description among several that a model has. Raises ConfigError."""
    theta = parameters.number("rope_theta", 1.0001, MAX_THETA, default_theta)
    return _whole_rope(Fields(parameters.where, {}), parameters, theta, _type_name(parameters), max_position)


def _whole_rope(config: Fields, parameters: Fields, theta: float, type_name: str, max_position: int) -> RopeConfig:
    match parameters.text(type_name, "default"):
        case "default":
            return RopeConfig(theta)
        case "dynamic":
            return _dynamic(parameters, theta)
        case "linear":
            return RopeConfig(theta, _linear(parameters))
        case "llama3":
            return RopeConfig(
                theta, _llama3_from_hf(parameters, _original_max_position(config, parameters, max_position))
            )
        case "yarn":
            original = _original_max_position(config, parameters, max_position)
            return RopeConfig(theta, _yarn_from_hf(parameters, original, max_position))
        case _:
            parameters.refuse(type_name, "supported are default, linear, dynamic, llama3 and yarn")


def partial_rope_from_hf(
    config: Fields, head_dim: int, max_position: int, longrope_names: tuple[str, ...] = ()
) -> RopeConfig:
    """As `rope_from_hf`, of a model that may turn a part of each head.

    Args:
        longrope_names: What the family calls LongRoPE; none: it has no such models.
    """
    parameters, theta, type_name = _hf_parameters(config)
    holder = parameters if parameters.has("partial_rotary_factor") else config
    rotary_dim = int(head_dim * holder.number("partial_rotary_factor", 0.0, 1.0, 1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        holder.refuse("partial_rotary_factor", f"must turn an even number of a head's {head_dim} dimensions")
    num_rotary_dims = None if rotary_dim == head_dim else rotary_dim
    match parameters.text(type_name, "default"):
        case "default":
            return RopeConfig(theta, num_rotary_dims=num_rotary_dims)
        case "dynamic":
            return replace(_dynamic(parameters, theta), num_rotary_dims=num_rotary_dims)
        case "linear":
            return RopeConfig(theta, _linear(parameters), num_rotary_dims=num_rotary_dims)
        case name if name in longrope_names:
            original = _original_max_position(config, parameters, max_position)
            scaling = _longrope_from_hf(parameters, rotary_dim // 2, original, max_position)
            return RopeConfig(theta, scaling, num_rotary_dims=num_rotary_dims)
        case _:
            known = ("default", "linear", "dynamic", *longrope_names[:1])
            parameters.refuse(type_name, f"supported are {', '.join(known)}")


def _hf_parameters(config: Fields) -> tuple[Fields, float, str]:
    """Where the scheme is described, the base of the wavelengths, and the name of the field that names the scheme."""
    groups = (config.group("rope_scaling"), config.group("rope_parameters"))
    # An empty one says nothing.
    parameters = next((group for group in groups if group is not None and group.values), Fields(config.where, {}))
    holder = parameters if parameters.has("rope_theta") else config
    theta = holder.number("rope_theta", 1.0001, MAX_THETA, DEFAULT_THETA)
    return parameters, theta, _type_name(parameters)


def _type_name(parameters: Fields) -> str:
    return "rope_type" if parameters.has("rope_type") else "type"


def _linear(parameters: Fields) -> LinearScaling:
    return LinearScaling(parameters.number("factor", 1.0, MAX_FACTOR))


def _dynamic(parameters: Fields, theta: float) -> RopeConfig:
    """Frequencies as trained: what dynamic scaling gives for every text that is no longer than the trained length, and
    a model is served no further, since beyond it each token more would turn all keys anew."""
    parameters.number("factor", 1.0, MAX_FACTOR)
    return RopeConfig(theta)


def _longrope_from_hf(
    parameters: Fields, num_factors: int, original_max_position: int, max_position: int
) -> LongRopeScaling:
    factors = parameters.values.get("short_factor")
    if not isinstance(factors, list) or len(factors) != num_factors or not all(map(_is_factor, factors)):
        parameters.refuse("short_factor", f"must be {num_factors} numbers above 0")
    factor = parameters.number("factor", 0.0, MAX_FACTOR, max_position / original_max_position)
    recommended = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(max(original_max_position, 2)))
    return LongRopeScaling(
        factors=tuple(map(float, factors)),
        original_max_position=original_max_position,
        attention_factor=parameters.number("attention_factor", 0.0, MAX_FACTOR, recommended),
    )


def _is_factor(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_FACTOR


def _original_max_position(config: Fields, parameters: Fields, max_position: int) -> int:
    name = "original_max_position_embeddings"
    # Beside the parameters rather than in them (Phi-3 writes it there) takes precedence, as in transformers.
    holder = config if config.has(name) else parameters
    return holder.integer(name, 1, MAX_POSITION, max_position)


def _llama3_from_hf(parameters: Fields, original_max_position: int) -> Llama3Scaling:
    low = parameters.number("low_freq_factor", 1e-6, MAX_FACTOR)
    high = parameters.number("high_freq_factor", 1e-6, MAX_FACTOR)
    if high <= low:
        parameters.refuse("high_freq_factor", f"must be above low_freq_factor, {low:g}")
    return Llama3Scaling(parameters.number("factor", 1.0, MAX_FACTOR), low, high, original_max_position)


def _yarn_from_hf(parameters: Fields, original_max_position: int, max_position: int) -> YarnScaling:
    factor = parameters.number("factor", 1.0, MAX_FACTOR, max_position / original_max_position)
    recommended = yarn_attention_factor(
        factor,
        parameters.number("mscale", 0.0, MAX_FACTOR, 0.0),
        parameters.number("mscale_all_dim", 0.0, MAX_FACTOR, 0.0),
    )
    return YarnScaling(
        factor=factor,
        original_max_position=original_max_position,
        attention_factor=parameters.number("attention_factor", 0.0, MAX_FACTOR, recommended),
        # Zero means unset in transformers too.
        beta_fast=parameters.number("beta_fast", 0.0, MAX_FACTOR, 32.0) or 32.0,
        beta_slow=parameters.number("beta_slow", 0.0, MAX_FACTOR, 1.0) or 1.0,
        truncate=parameters.boolean("truncate", True),
    )


def rope_from_gguf(metadata: Fields, max_position: int, freq_factors: tuple[float, ...]) -> RopeConfig:
    """From the rope.* fields of a GGUF file's architecture, and its rope_freqs tensor (empty: it has none)."""
    theta = metadata.number("rope.freq_base", 1.0001, MAX_THETA, DEFAULT_THETA)
    # scale_linear is what files of 2023 say.
    factor_name = "rope.scaling.factor" if metadata.has("rope.scaling.factor") else "rope.scale_linear"
    # llama.cpp writes 0 for "as trained".
    factor = metadata.number(factor_name, 0.0, MAX_FACTOR, 1.0) or 1.0
    match metadata.text("rope.scaling.type", "linear"):
        case "none":
            return RopeConfig(theta, None, freq_factors)
        case "linear":
            return RopeConfig(theta, LinearScaling(factor) if factor != 1.0 else None, freq_factors)
        case "yarn":
            original = metadata.integer("rope.scaling.original_context_length", 1, MAX_POSITION, max_position)
            return RopeConfig(theta, _yarn_from_gguf(metadata, factor, original), freq_factors)
        case _:
            metadata.refuse("rope.scaling.type", "supported are none, linear and yarn")


def _yarn_from_gguf(metadata: Fields, factor: float, original_max_position: int) -> YarnScaling:
    # Of what those change, llama.cpp's versions differ.
    for name, usual in (("yarn_attn_factor", 1.0), ("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if metadata.number(f"rope.scaling.{name}", -MAX_FACTOR, MAX_FACTOR, usual) != usual:
            metadata.refuse(
                f"rope.scaling.{name}", f"only {usual:g} is supported: take the model's Hugging Face directory"
            )
    return YarnScaling(
        factor,
        original_max_position,
        metadata.number("rope.scaling.attn_factor", 0.0, MAX_FACTOR, 1.0) * yarn_attention_factor(factor),
        beta_fast=metadata.number("rope.scaling.yarn_beta_fast", 1e-6, MAX_FACTOR, 32.0),
        beta_slow=metadata.number("rope.scaling.yarn_beta_slow", 1e-6, MAX_FACTOR, 1.0),
    )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns `x` [T, heads, head_dim] by each token's angles, in float32, and returns it in its own dtype.

    Args:
        cos, sin: [T, 1, rotary_dim] float32: dimensions behind these stay as they are. Both halves of the last
            dimension hold the same angles, and the sine's first half is negated, so that the turn is two products and
            a swap of halves.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), dim=-1)
    return (x * cos + x.roll(rotary_dim // 2, dims=-1) * sin).to(x.dtype)


def angles(positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine for `rotate` of tokens at `positions` [T]."""
    theta = positions.to(torch.float32).unsqueeze(-1) * inv_freq
    cos, sin = theta.cos() * scaling, theta.sin() * scaling
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def rotation_table(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each pair's angle at each position, each [num_positions, head_dim / 2] float32 on CPU.

    Pairs that do not turn come last, with angles of 0.
    """
    positions = torch.arange(num_positions, dtype=torch.float32)
    theta = positions.unsqueeze(-1) * inverse_frequencies(rope, head_dim)
    num_still = head_dim // 2 - theta.shape[1]
    cosines, sines = theta.cos().mul_(rope.attention_scaling), theta.sin().mul_(rope.attention_scaling)
    return F.pad(cosines, (0, num_still), value=1.0), F.pad(sines, (0, num_still))
