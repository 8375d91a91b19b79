"""Whatever bytes a checkpoint's files hold, opening them ends in a model or in one line that says what to do."""

import json
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.loader import check_tensors
from engine.models import build_model
from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError
from tests.tiny_families import make_tiny_family
from tests.unit.engine.test_checkpoint_gguf import Writer

_MAX_S = 5.0
# Beyond what the process has when an example begins: a number in a file that was believed would take far more.
_MAX_BYTES = 1 << 30

# Small files, but headers of some thousand bytes: most examples change these.
_PLACES = st.one_of(st.integers(0, 200), st.integers(0, 4000), st.integers(0, 1 << 30))
_VALUES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([struct.pack("<Q", number) for number in (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)]),
    st.sampled_from([b'"', b"}", b"[", b",", b"-", b"1e999", b"99999999999", b"null", b"NaN", b"\xff"]),
)
_CHANGES = st.lists(st.tuples(_PLACES, _VALUES), max_size=3)
_CUTS = st.one_of(st.none(), _PLACES)
_FIELD_VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, -1, 0, 1, 3, 0.5, 2**31, 2**64, 10**30, 1e308, -1e308, "", "x", "linear", "gelu"]
    ),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=12),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", "type"]), st.floats() | st.text(max_size=3)),
)
_EXAMPLES = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damaged(content: bytes, changes: list[tuple[int, bytes]], cut: int | None) -> bytes:
    for place, value in changes:
        place %= len(content)
        content = (content[:place] + value + content[place + len(value) :])[: len(content)]
    return content if cut is None else content[: cut % len(content)]


@contextmanager
def little_memory() -> Iterator[None]:
    """Allocations of more than `_MAX_BYTES` raise MemoryError, which no test expects."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _MAX_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refusal(path: Path) -> ConfigError | None:
    """What opening it raises on purpose. All else that it may raise fails the test."""
    try:
        checkpoint = open_checkpoint(str(path))
        check_tensors(checkpoint, build_model(checkpoint.config))
    except ConfigError as error:
        return error
    return None


def open_or_refuse(path: Path) -> None:
    began = time.monotonic()
    with little_memory():
        refused = refusal(path)
    assert time.monotonic() - began < _MAX_S
    if refused is not None:
        assert "\n" not in refused.message
        assert str(path) in refused.message


@pytest.fixture
def directory(tiny_llama: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama("gqa"), tmp_path / "model")


@_EXAMPLES
@given(changes=_CHANGES, cut=_CUTS)
def test_safetensors(
    directory: Path, tiny_llama: Callable[[str], Path], changes: list[tuple[int, bytes]], cut: int | None
) -> None:
    name = "model.safetensors"
    (directory / name).write_bytes(damaged((tiny_llama("gqa") / name).read_bytes(), changes, cut))
    open_or_refuse(directory)


@_EXAMPLES
@given(changes=_CHANGES, cut=_CUTS)
def test_config(
    directory: Path, tiny_llama: Callable[[str], Path], changes: list[tuple[int, bytes]], cut: int | None
) -> None:
    name = "config.json"
    (directory / name).write_bytes(damaged((tiny_llama("gqa") / name).read_bytes(), changes, cut))
    open_or_refuse(directory)


@_EXAMPLES
@given(data=st.data(), value=_FIELD_VALUES)
@pytest.mark.parametrize("shape", ["qwen3-narrow", "phi3-longrope", "mistral-window"])
def test_fields_of_a_config(
    family: Callable[[str], Path], tmp_path: Path, shape: str, data: st.DataObject, value: object
) -> None:
    fields = json.loads((family(shape) / "config.json").read_text())
    holder = data.draw(st.sampled_from([fields, *(nested for nested in fields.values() if isinstance(nested, dict))]))
    holder[data.draw(st.sampled_from(sorted(holder)))] = value
    shutil.copytree(family(shape), tmp_path / "model", dirs_exist_ok=True)
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    open_or_refuse(tmp_path / "model")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def directory(shape: str) -> Path:
        if shape not in made:
            made[shape] = make_tiny_family(tmp_path_factory.mktemp("families") / shape, shape)
        return made[shape]

    return directory


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[[str], Path]) -> bytes:
    return Writer(tiny_llama("rope-llama3")).write(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@_EXAMPLES
@given(changes=_CHANGES, cut=_CUTS)
def test_gguf(gguf: bytes, tmp_path: Path, changes: list[tuple[int, bytes]], cut: int | None) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(damaged(gguf, changes, cut))
    open_or_refuse(path)
