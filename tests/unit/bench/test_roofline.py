from math import prod

import pytest

from bench.engine.limits import best
from bench.engine.random_llama import LLAMA_8B, TINY
from bench.engine.roofline import (
    Limits,
    Work,
    decode_work,
    layer_parameters,
    lm_head_parameters,
    prefill_work,
)
from engine.model_config import ModelConfig
from engine.models import build_model

BF16 = 2


@pytest.mark.parametrize("config", [TINY, LLAMA_8B], ids=lambda config: config.name)
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in build_model(config).named_parameters()}
    matrices = {name: prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    assert layer_parameters(config) == sum(size for name, size in matrices.items() if ".layers." in name)
    assert lm_head_parameters(config) == matrices["lm_head.weight"]


def test_prefill_counts_one_row_of_logits_and_causal_attention() -> None:
    one, two = prefill_work(TINY, 100, BF16), prefill_work(TINY, 200, BF16)
    linear = 2 * 100 * layer_parameters(TINY)
    attention = 2 * 100**2 * TINY.num_layers * TINY.hidden_size
    assert one.flops == linear + attention + 2 * lm_head_parameters(TINY)
    assert two.flops - one.flops == linear + 3 * attention
    assert one.num_bytes == two.num_bytes == BF16 * (layer_parameters(TINY) + lm_head_parameters(TINY))


def test_decode_reads_weights_once_and_the_cache_of_each_sequence() -> None:
    weights = layer_parameters(TINY) + lm_head_parameters(TINY)
    kv_bytes = BF16 * 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim
    work = decode_work(TINY, 8, 160, BF16)
    assert work.num_bytes == BF16 * weights + 8 * 160 * kv_bytes
    assert work.flops == 8 * (2 * weights + 160 * 4 * TINY.num_layers * TINY.hidden_size)


def test_the_larger_of_the_two_limits_holds() -> None:
    work = Work(num_tokens=4, flops=1000.0, num_bytes=100.0)
    assert work.tokens_per_s(Limits(bandwidth_bytes_per_s=100.0, gemm_flops_per_s=500.0)) == pytest.approx(2.0)
    assert work.tokens_per_s(Limits(bandwidth_bytes_per_s=10.0, gemm_flops_per_s=500.0)) == pytest.approx(0.4)


def test_the_best_of_samples_is_exceeded_by_none() -> None:
    assert best([Limits(3.0, 10.0), Limits(5.0, 7.0)]) == Limits(5.0, 10.0)
