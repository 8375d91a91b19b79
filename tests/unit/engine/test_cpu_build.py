"""Which kernels a machine gets, and what it is told where it gets none."""

from pathlib import Path

import pytest

from engine.cpu import build
from engine.cpu.build import X86_TARGETS, BuildError, compile_kernels, this_target

_V4 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


_BF16 = {"avx512_bf16", "avx512_vnni", "avx512vbmi"}


@pytest.mark.parametrize(("features", "name"), [(_V4 | _BF16 | {"sse"}, "avx512-bf16"), (_V4, "avx512")])
def test_the_best_that_the_processor_has(monkeypatch: pytest.MonkeyPatch, features: set[str], name: str) -> None:
    monkeypatch.setattr(build, "_cpu_features", lambda: frozenset(features))
    assert this_target().name == name


@pytest.mark.parametrize("features", [set(), {"avx2", "fma"}, _V4 - {"avx512vl"}])
def test_without_avx512_there_are_none(monkeypatch: pytest.MonkeyPatch, features: set[str]) -> None:
    monkeypatch.setattr(build, "_cpu_features", lambda: frozenset(features))
    with pytest.raises(BuildError, match="AVX-512"):
        this_target()


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"install g\+\+"):
        compile_kernels(X86_TARGETS[0], tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())
