"""How a model is split: all of it, once, fairly; or not at all, and then the refusal says how it can be."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.engine.random_llama import LLAMA_8B, TINY
from engine.decoder_config import DecoderLayers, ExpertsConfig
from engine.model_config import ModelConfig
from engine.parallel.shard import Shard, shard_of
from pdmesh.errors import ConfigError

# Of the busiest rank's share of a layer to the average; what the least model that can be split so allows.
FAIR = 1.25
# 9 query heads over 3 KV heads, as SmolLM2-135M.
SMOLLM2 = replace(TINY, num_heads=9, num_kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536)


def shards(config: ModelConfig, tp: int, pp: int) -> list[Shard]:
    return [shard_of(config, tp=tp, pp=pp, rank=rank) for rank in range(tp * pp)]


def possible(config: ModelConfig) -> list[int]:
    degrees = []
    for tp in range(1, config.num_heads + 1):
        try:
            shard_of(config, tp=tp)
        except ConfigError:
            continue
        degrees.append(tp)
    return degrees


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    num_kv_heads = draw(st.integers(1, 12))
    return replace(
        TINY,
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * draw(st.integers(1, 9)),
        num_layers=draw(st.integers(1, 40)),
        head_dim=draw(st.sampled_from([8, 64, 128])),
        intermediate_size=draw(st.integers(1, 3000)),
        vocab_size=draw(st.integers(1, 5000)),
    )


@given(models(), st.data())
def test_a_split_covers_the_model(config: ModelConfig, data: st.DataObject) -> None:
    tp = data.draw(st.sampled_from(possible(config)))
    pp = data.draw(st.integers(1, config.num_layers))
    ranks = shards(config, tp, pp)
    group = config.num_heads // config.num_kv_heads
    for stage in range(pp):
        of_stage = ranks[stage * tp : (stage + 1) * tp]
        assert [(shard.pp_rank, shard.tp_rank) for shard in of_stage] == [(stage, rank) for rank in range(tp)]
        assert_covered([shard.heads for shard in of_stage], config.num_heads)
        assert_covered([shard.intermediate for shard in of_stage], config.intermediate_size)
        assert_covered([shard.vocab for shard in of_stage], config.vocab_size)
        for shard in of_stage:
            # Its heads have their KV heads there, each of these equally many, as attention takes them.
            assert len(shard.heads) % len(shard.kv_heads) == 0
            share = len(shard.heads) // len(shard.kv_heads)
            for number, head in enumerate(shard.heads):
                assert head // group == shard.kv_heads[number // share]
            assert shard.layers == of_stage[0].layers
            # The kernels write whole panels of logits side by side.
            assert shard.vocab.start % 32 == 0
        if tp <= config.num_kv_heads:
            assert_covered([shard.kv_heads for shard in of_stage], config.num_kv_heads)
        else:
            assert {head for shard in of_stage for head in shard.kv_heads} == set(range(config.num_kv_heads))
        work = [
            2 * config.head_dim * (len(shard.heads) + len(shard.kv_heads)) + 3 * len(shard.intermediate)
            for shard in of_stage
        ]
        assert max(work) <= FAIR * sum(work) / tp
    of_stages = [shard.layers for shard in ranks[::tp]]
    assert_covered(of_stages, config.num_layers)
    assert max(map(len, of_stages)) - min(map(len, of_stages)) <= 1
    assert [shard.first_stage for shard in ranks] == [rank < tp for rank in range(tp * pp)]
    assert [shard.last_stage for shard in ranks] == [rank >= tp * (pp - 1) for rank in range(tp * pp)]


def assert_covered(parts: list[range], total: int) -> None:
    """Each part has something, and together they are everything once, in order."""
    assert all(len(part) for part in parts)
    assert [value for part in parts for value in part] == list(range(total))


@given(models(), st.integers(2, 30))
def test_a_refusal_names_every_degree_that_works(config: ModelConfig, tp: int) -> None:
    degrees = possible(config)
    assert degrees[0] == 1
    if tp in degrees:
        return
    with pytest.raises(ConfigError) as caught:
        shard_of(config, tp=tp)
    named = caught.value.message.partition("; use ")[2]
    assert [int(degree) for degree in re.findall(r"\d+", named)] == degrees


@pytest.mark.parametrize(
    ("config", "degrees"),
    [
        # The MLP weighs most: whoever has a KV head more than the others has not much more.
        (LLAMA_8B, [*range(1, 9), 16, 24, 32]),
        (SMOLLM2, [1, 2, 3, 6, 9]),
        (TINY, [1, 2, 4]),
    ],
    ids=["8b", "smollm2", "tiny"],
)
def test_the_degrees_of_known_models(config: ModelConfig, degrees: list[int]) -> None:
    assert possible(config) == degrees


def test_every_kind_of_mlp_is_shared_fairly() -> None:
    layers = DecoderLayers.of(TINY)
    experts = ExpertsConfig(8, 2, True, 96, layers=(True, False, True, True))
    some = replace(TINY, layers=replace(layers, experts=experts))
    assert [shard.expert_intermediate for shard in shards(some, tp=2, pp=1)] == [range(48), range(48, 96)]
    assert [shard.intermediate for shard in shards(some, tp=2, pp=1)] == [range(512), range(512, 1024)]
    # Three columns of each expert: two ranks of four would have none.
    narrow = replace(TINY, layers=replace(layers, experts=replace(experts, intermediate_size=3)))
    assert possible(TINY) == [1, 2, 4]
    assert 4 not in possible(narrow)
    # Where every layer has experts, the width of an MLP that no layer has does not count.
    unused = replace(TINY, intermediate_size=1, layers=replace(layers, experts=replace(experts, layers=())))
    assert possible(unused) == [1, 2, 4]


def test_uneven_heads() -> None:
    first, second = shards(SMOLLM2, tp=2, pp=1)
    assert (first.heads, first.kv_heads) == (range(3), range(1))
    assert (second.heads, second.kv_heads) == (range(3, 9), range(1, 3))


def test_ranks_that_share_a_kv_head() -> None:
    assert [shard.kv_heads for shard in shards(TINY, tp=4, pp=1)] == [range(1), range(1), range(1, 2), range(1, 2)]
    assert [shard.heads for shard in shards(TINY, tp=4, pp=1)] == [range(n, n + 1) for n in range(4)]


def test_more_stages_than_layers() -> None:
    with pytest.raises(ConfigError, match="--pp is 5 and the model has 4 layers: use at most as many stages"):
        shard_of(TINY, pp=5)
    assert [shard.layers for shard in shards(TINY, tp=1, pp=3)] == [range(1), range(1, 2), range(2, 4)]


def test_one_rank_takes_any_model() -> None:
    tiny = shard_of(replace(TINY, vocab_size=2, intermediate_size=1))
    assert (tiny.vocab, tiny.intermediate) == (range(2), range(1))
