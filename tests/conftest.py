"""Fixtures that every suite shares."""

from pathlib import Path

import pytest
from hypothesis import settings

from pdmesh.cli.model_download import smollm2 as fetch_smollm2
from tests.tiny_models import make_tiny_model

# How long an example takes says more of the machine than of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with grouped-query attention; see tests/tiny_models.py."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), "gqa")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as GGUF, real weights; downloaded once into the user's cache."""
    return fetch_smollm2()
