"""A model goes to the CUDA kernels exactly where they can serve it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.backend import Choice, Way, choose_way
from engine.config import EngineConfig
from engine.cuda.support import no_kernels_because, unsupported
from engine.decoder_config import AlibiPositions, AttentionConfig, DecoderLayers, ExpertsConfig
from engine.kv_cache import PLAIN
from engine.loader import load_model
from engine.model_config import ModelConfig
from tests.unit.engine.cuda_device import needs_cuda


@pytest.fixture
def config(tiny_model: Path) -> ModelConfig:
    return load_model(str(tiny_model), "float32", torch.device("cpu"), lambda done, total: None).config


def test_common_shapes_are_supported(config: ModelConfig) -> None:
    assert unsupported(config) is None
    assert unsupported(replace(config, num_heads=32, num_kv_heads=1, head_dim=256)) is None


def test_others_are_refused_with_the_reason(config: ModelConfig) -> None:
    assert "288 dimensions" in (unsupported(replace(config, head_dim=288)) or "")
    assert "71 query heads" in (unsupported(replace(config, num_heads=71, num_kv_heads=1)) or "")
    assert "sliding windows" in (unsupported(replace(config, windows=(None, 20, None))) or "")
    layers = DecoderLayers.of(config)
    for reason, other in {
        "caps its attention's scores": replace(layers, attention=AttentionConfig(soft_cap=50.0)),
        "in a way of its own": replace(layers, attention=AttentionConfig(score_scale=0.1)),
        "ALiBi": replace(layers, positions=AlibiPositions()),
        "mixtures of experts": replace(layers, experts=ExpertsConfig(8, 2, True, 64)),
    }.items():
        assert reason in (unsupported(replace(config, layers=other)) or "")


def test_kv_in_8_bits_is_read_by_torch(config: ModelConfig) -> None:
    told = EngineConfig(model="tiny", kv_cache_dtype="int8")
    choice = choose_way(told, config, PLAIN, torch.device("cuda"), has_cpu_kernels=False)
    assert choice == Choice(Way.TORCH, "the CUDA kernels read no KV cache in int8")


@needs_cuda
def test_a_device_may_be_the_reason_too(config: ModelConfig) -> None:
    because = no_kernels_because(replace(config, head_dim=288), torch.device("cuda")) or ""
    assert "head" in because or "Triton" in because
