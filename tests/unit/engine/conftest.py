"""Tiny random Llamas on disk: one directory per shape, made once and never written again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_llamas import make_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the tiny model of a shape; see tests/tiny_llamas.py."""
    made: dict[str, Path] = {}

    def directory(shape: str) -> Path:
        if shape not in made:
            made[shape] = make_tiny_llama(tmp_path_factory.mktemp("models") / f"tiny-{shape}", shape)
        return made[shape]

    return directory
