"""Compiles the kernels, once for a kind of processor, and keeps them: `python -m engine.cpu.build [DIRECTORY|--here]`.

At first use they are compiled for the processor at hand, into ~/.cache/pdmesh/kernels; `--here` does so now. Images,
which do not know where they will run, get all kinds beforehand: the command compiles them into `engine/cpu/built`,
which is looked into first.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "kernels"
_BUILT = Path(__file__).parent / "built"
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fPIC")
_WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")
_COMPILERS = ("c++", "g++", "clang++")


class BuildError(Exception):
    """The kernels cannot be had here. The message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of processor.

    Attributes:
        features: What /proc/cpuinfo must list.
        flags: The compiler's for it.
    """

    name: str
    features: frozenset[str]
    flags: tuple[str, ...]


# x86-64-v4 and what it includes.
_AVX512 = frozenset(
    ("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
)

# The best first.
X86_TARGETS = (
    # All but the first that multiplied bfloat16 look up bytes in registers and multiply integers of 16 bits, too.
    Target(
        "avx512-bf16",
        _AVX512 | {"avx512_bf16", "avx512_vnni", "avx512vbmi"},
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"),
    ),
    Target("avx512", _AVX512, ("-march=x86-64-v4",)),
)


def this_target() -> Target:
    """The best for this machine. Raises BuildError where there is none.

    Vectors of 64 bytes are what the kernels are written in. Compilers keep them in memory where registers are smaller,
    and with AVX2 that is several times slower than torch.
    """
    features = _cpu_features()
    for target in X86_TARGETS:
        if target.features <= features:
            return target
    raise BuildError("they need AVX-512, which this processor does not have")


def kernels_path(target: Target) -> Path:
    """The compiled kernels, compiled now if they were not before. Raises BuildError."""
    path = _place(target)
    if not path.exists():
        cache = path.parent
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with (cache / "lock").open("w") as lock:
                # Workers that start side by side compile once.
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    compile_kernels(target, path)
        except OSError as error:
            raise BuildError(f"{cache} cannot be written ({error}): set XDG_CACHE_HOME to where it can") from error
    return path


def check_kernels() -> None:
    """Sees whether `kernels_path` can be expected to give kernels here, and compiles none. Raises BuildError."""
    if not _place(this_target()).exists():
        _compiler()


def compile_kernels(target: Target, path: Path) -> None:
    """Raises BuildError where there is no compiler, or it fails."""
    compiler = _compiler()
    began = time.monotonic()
    log.info("compiling the CPU kernels for %s, once", target.name)
    # In the target's directory, so that the last step is a rename: whoever finds the file finds all of it.
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        output = Path(directory) / path.name
        sources = [source for source in _source_files() if source.suffix == ".cpp"]
        objects = [str(Path(directory) / f"{source.stem}.o") for source in sources]
        compiling = [compiler, *_FLAGS, *_WARNINGS, *target.flags, "-c"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # The largest first, so that they end together.
            pairs = sorted(zip(sources, objects, strict=True), key=lambda pair: "decoder.h" not in pair[0].read_text())
            list(pool.map(lambda pair: _run([*compiling, str(pair[0]), "-o", pair[1]]), pairs))
        _run([compiler, "-shared", "-fopenmp", *objects, "-o", str(output)])
        output.replace(path)
    log.info("compiled the CPU kernels in %.1f s", time.monotonic() - began)


def _run(command: Sequence[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise BuildError(f"{' '.join(command)} failed: {finished.stderr[-2000:]}")


def _place(target: Target) -> Path:
    """Where the kernels lie, or are put when they are compiled."""
    name = _file_name(target)
    if (_BUILT / name).exists():
        return _BUILT / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdmesh" / "kernels" / name


def _compiler() -> str:
    named = os.environ.get("CXX")
    compiler = next((found for name in ([named] if named else _COMPILERS) if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler ({named or ', '.join(_COMPILERS)}): install g++")
    return compiler


def _file_name(target: Target) -> str:
    """Names what went into it: changed sources are other kernels."""
    digest = hashlib.sha256(" ".join((*_FLAGS, *target.flags)).encode())
    for source in _source_files():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"{target.name}-{digest.hexdigest()[:16]}.so"


def _source_files() -> Sequence[Path]:
    return sorted(_SOURCES.iterdir())


def _cpu_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    names = ("flags", "Features")
    listed = (line.partition(":")[2] for line in lines if line.partition(":")[0].strip() in names)
    return frozenset(next(listed, "").split())


def main(arguments: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments[:1] == ["--here"]:
        # Where there can be none, a worker says so and computes without.
        with contextlib.suppress(BuildError):
            kernels_path(this_target())
        return 0
    directory = Path(arguments[0]) if arguments else _BUILT
    # On other machines the directory stays empty: plain torch computes there.
    targets = X86_TARGETS if platform.machine() in ("x86_64", "AMD64") else ()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for target in targets:
            compile_kernels(target, directory / _file_name(target))
    except (BuildError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
