"""A model goes to the CUDA kernels exactly where they can serve it."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.cuda.support import can_use_kernels, unsupported
from engine.loader import load_model
from engine.model_config import ModelConfig
from tests.unit.engine.cuda_device import needs_cuda

KV = torch.float32


@pytest.fixture
def config(tiny_model: Path) -> ModelConfig:
    return load_model(str(tiny_model), "float32", torch.device("cpu"), lambda done, total: None).config


def test_common_shapes_are_supported(config: ModelConfig) -> None:
    assert unsupported(config, KV) is None
    assert unsupported(replace(config, num_heads=32, num_kv_heads=1, head_dim=256), KV) is None


def test_others_are_refused_with_the_reason(config: ModelConfig) -> None:
    assert "288 dimensions" in (unsupported(replace(config, head_dim=288), KV) or "")
    assert "71 query heads" in (unsupported(replace(config, num_heads=71, num_kv_heads=1), KV) or "")
    assert "sliding windows" in (unsupported(replace(config, windows=(None, 20, None)), KV) or "")
    assert unsupported(config, torch.int8) == "the KV cache is int8"


def test_a_cpu_is_no_cuda_device(config: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    assert not can_use_kernels(config, torch.device("cpu"), KV)
    assert not caplog.records


@needs_cuda
def test_a_warning_says_why_not(config: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not can_use_kernels(replace(config, head_dim=288), torch.device("cuda"), KV)
    assert "head" in caplog.text or "Triton" in caplog.text
