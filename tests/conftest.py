"""Fixtures that every suite shares."""

from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with grouped-query attention; see tests/tiny_models.py."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), "gqa")
