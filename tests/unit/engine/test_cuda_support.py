"""A model goes to the CUDA kernels exactly where they can serve it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.cuda.support import no_kernels_because, unsupported
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


@needs_cuda
def test_a_device_may_be_the_reason_too(config: ModelConfig) -> None:
    because = no_kernels_because(replace(config, head_dim=288), torch.device("cuda")) or ""
    assert "head" in because or "Triton" in because
