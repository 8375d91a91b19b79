"""What a person names as a model: a Hugging Face directory, a .gguf file, a directory that holds one, or a Hub id.

Router and workers resolve it by this one rule, so that they agree on the model's name.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pdmesh.errors import ConfigError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_name(source: str) -> str:
    """The name of the model at `source`: a file's stem, a directory's name or a Hub id. Looks at local paths only."""
    path = _local(source)
    if path is None:
        return source
    return path.stem if path.is_file() else path.resolve().name


def find_model(source: str, hub_files: Sequence[str]) -> Path:
    """Where the model's files are: a .gguf file or a Hugging Face model directory.

    Args:
        source: What a person named.
        hub_files: Patterns of the files to download, where it is a repository of the Hub and not in its cache.

    Raises:
        ConfigError: if there is no such model.
    """
    path = _local(source)
    if path is not None:
        return path
    if not is_hub_id(source):
        raise ConfigError(f"{source}: no such file or directory: name a model directory, a .gguf file or a Hub id")
    return _downloaded(source, hub_files)


@contextmanager
def files_can_be_read(source: str) -> Iterator[None]:
    """Around what looks for a model's files and reads them: what the system refuses is a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or source}: cannot be read ({error.strerror}): check the file and its permissions"
        ) from error


def is_hub_id(source: str) -> bool:
    """Whether `source` could name a repository of the Hub."""
    return _HUB_ID.fullmatch(source) is not None and not source.endswith(".gguf")


def _local(source: str) -> Path | None:
    """The path that `source` names, if it exists; the .gguf file of a directory that holds one and no config.json."""
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) > 1:
            raise ConfigError(f"{path}: holds {len(ggufs)} .gguf files: name the one to serve")
        return ggufs[0] if ggufs else path
    return path if path.exists() else None


def _downloaded(repo_id: str, files: Sequence[str]) -> Path:
    # Imported where it is used: it takes long, and most models are local.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(files)))
    except Exception as error:
        # The library's errors for network, names, permissions and transfer share no base, and the remedy is one.
        # They are long; the first line says what happened.
        cause = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{repo_id}: no such path here, and not to be had from the Hugging Face Hub ({cause}): "
            "check the name and the network, or download the model and name its directory"
        ) from error
