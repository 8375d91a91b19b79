"""What a person names as a model, resolved to an open checkpoint."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from engine.weights.checkpoint import Checkpoint
from engine.weights.gguf_file import GgufFile
from engine.weights.hf_directory import DOWNLOAD_PATTERNS, HfDirectory
from pdmesh.errors import ConfigError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_checkpoint(source: str) -> Checkpoint:
    """Opens a Hugging Face model directory, a .gguf file or, where no such path exists, a repository of the Hub.

    A repository is downloaded into the Hub's cache first, or taken from there.

    Raises:
        ConfigError: if there is no such model, or its files are damaged.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return GgufFile(path)
    if path.is_dir():
        return HfDirectory(path, path.resolve().name)
    if _HUB_ID.fullmatch(source) and path.suffix != ".gguf":
        return HfDirectory(_downloaded(source), source)
    raise ConfigError(f"{source}: no such file or directory: name a model directory, a .gguf file or a Hub id")


def _downloaded(repo_id: str) -> Path:
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(DOWNLOAD_PATTERNS)))
    except Exception as error:
        # The library's errors for network, names, permissions and transfer share no base, and the remedy is one.
        # They are long; the first line says what happened.
        cause = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{repo_id}: no such path here, and not to be had from the Hugging Face Hub ({cause}): "
            "check the name and the network, or download the model and name its directory"
        ) from error
