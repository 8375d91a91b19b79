"""What one rank holds of a model.

Tensor parallelism (Megatron-LM, arXiv:1909.08053) splits every layer: query heads with the KV head that they share,
the columns of the MLP, the rows of the vocabulary. Pipeline parallelism splits the list of layers. Where there are more
tensor-parallel ranks than KV heads, each KV head is held by several of them, which share out its query heads.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from engine.decoder_config import DecoderLayers
from engine.model_config import ModelConfig
from pdmesh.errors import ConfigError

# The busiest of the ranks may have so many times the weights of a layer that they have on average.
_MAX_UNFAIRNESS: Final = 1.25
# Whole panels of the CPU kernels, and whole blocks of most quantisations.
_UNIT: Final = 32
_FEW_UNITS: Final = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """Ranges of the whole model. The first stage embeds tokens, the last makes logits.

    Attributes:
        heads: Query heads.
        kv_heads: What they attend to; each serves equally many of `heads`.
        intermediate: Columns of the MLP.
        expert_intermediate: Columns of each expert of a mixture.
        vocab: Rows of the embedding and of the output matrix.
    """

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    heads: range
    kv_heads: range
    layers: range
    intermediate: range
    expert_intermediate: range
    vocab: range

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def shard_of(config: ModelConfig, *, tp: int = 1, pp: int = 1, rank: int = 0) -> Shard:
    """What `rank` of tp * pp holds; the ranks of a pipeline's stage are consecutive.

    Raises ConfigError where the model cannot be split so, saying how it can.
    """
    if pp > config.num_layers:
        raise ConfigError(f"--pp is {pp} and the model has {config.num_layers} layers: use at most as many stages")
    splits = _splits(config, tp)
    if splits is None:
        raise ConfigError(
            f"--tp is {tp}: {config.num_heads} heads over {config.num_kv_heads} KV heads cannot be shared fairly among "
            f"so many ranks; use {_or(possible_tp(config))}"
        )
    pp_rank, tp_rank = divmod(rank, tp)
    heads, kv_heads = splits[tp_rank]
    return Shard(
        tp_rank=tp_rank,
        tp_size=tp,
        pp_rank=pp_rank,
        pp_size=pp,
        heads=heads,
        kv_heads=kv_heads,
        layers=_spread(config.num_layers, pp)[pp_rank],
        intermediate=_spread(config.intermediate_size, tp, _UNIT)[tp_rank],
        expert_intermediate=_spread(_expert_columns(config), tp, _UNIT)[tp_rank],
        vocab=_spread(config.vocab_size, tp, _UNIT, whole_units=True)[tp_rank],
    )


def _splits(config: ModelConfig, tp: int) -> list[tuple[range, range]] | None:
    """Each tensor-parallel rank's heads and KV heads; None where they cannot be shared fairly."""
    num_kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    if tp == 1:
        return [(range(config.num_heads), range(num_kv_heads))]
    if tp <= num_kv_heads:
        splits = [(range(group * part.start, group * part.stop), part) for part in _spread(num_kv_heads, tp)]
    elif tp % num_kv_heads or tp // num_kv_heads > group:
        return None
    else:
        splits = [
            (range(group * kv_head + part.start, group * kv_head + part.stop), range(kv_head, kv_head + 1))
            for kv_head in range(num_kv_heads)
            for part in _spread(group, tp // num_kv_heads)
        ]
    attention = [2 * config.head_dim * (len(heads) + len(kv_heads)) for heads, kv_heads in splits]
    mlps = _mlps_of_ranks(config, tp)
    fair = all(_is_fair([sum(of_rank) for of_rank in zip(attention, mlp, strict=True)]) for mlp in mlps)
    return splits if fair and min(map(min, mlps)) and config.vocab_size >= tp * _UNIT else None


def _mlps_of_ranks(config: ModelConfig, tp: int) -> list[list[int]]:
    """Of each kind of MLP that layers have: each rank's weights, by the hidden size."""
    layers = DecoderLayers.of(config)
    num_maps = 3 if layers.mlp.gated else 2
    mlps = []
    experts = layers.experts
    if experts is None or not all(map(experts.in_layer, range(config.num_layers))):
        mlps.append([num_maps * len(part) for part in _spread(config.intermediate_size, tp, _UNIT)])
    if experts is not None:
        num_maps *= experts.num_experts
        mlps.append([num_maps * len(part) for part in _spread(experts.intermediate_size, tp, _UNIT)])
    return mlps


def _is_fair(work: list[int]) -> bool:
    """Of each rank's."""
    return max(work) * len(work) <= _MAX_UNFAIRNESS * sum(work)


def _expert_columns(config: ModelConfig) -> int:
    experts = DecoderLayers.of(config).experts
    return 0 if experts is None else experts.intermediate_size


def possible_tp(config: ModelConfig) -> list[int]:
    """The tensor-parallel degrees that share the model's heads fairly."""
    return [tp for tp in range(1, config.num_heads + 1) if _splits(config, tp) is not None]


def _spread(total: int, num_parts: int, unit: int = 1, *, whole_units: bool = False) -> list[range]:
    """`total` in consecutive parts as equal as can be; in units where that makes little difference, or it must be.

    What is left of the last unit goes to the last part.
    """
    num_units = total // unit
    if not whole_units and num_units < _FEW_UNITS * num_parts:
        unit, num_units = 1, total
    ends = [unit * (num_units * part // num_parts) for part in range(num_parts)] + [total]
    return [range(begin, end) for begin, end in pairwise(ends)]


def _or(degrees: list[int]) -> str:
    *first, last = map(str, degrees)
    return f"{', '.join(first)} or {last}" if first else last
