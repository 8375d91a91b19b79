"""What a person names as a model, as an open checkpoint."""

from engine.weights.checkpoint import Checkpoint
from engine.weights.gguf_file import GgufFile
from engine.weights.hf_directory import DOWNLOAD_PATTERNS, HfDirectory
from pdmesh.model_source import files_can_be_read, find_model, model_name


def open_checkpoint(source: str) -> Checkpoint:
    """Opens a Hugging Face model directory, a .gguf file or a repository of the Hub; see pdmesh/model_source.py.

    Raises:
        ConfigError: if there is no such model, or its files are damaged.
    """
    with files_can_be_read(source):
        path = find_model(source, DOWNLOAD_PATTERNS)
        return GgufFile(path) if path.is_file() else HfDirectory(path, model_name(source))
