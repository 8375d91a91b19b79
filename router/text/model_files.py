"""The files of a model that tell how its text works, found from what a person names. Weights are never read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdmesh.errors import ConfigError

# All that is fetched from the Hub.
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# tokenizer_config.json lists every added token, so it may be large; far beyond any there is.
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What was found. At least one of `tokenizer_json` and `gguf` is there.

    Attributes:
        name: The model's name, by the rule by which workers name theirs.
        tokenizer_config, config, generation_config: Empty where there is no such file.
        chat_template: The template from a file of its own.
    """

    name: str
    tokenizer_json: Path | None
    gguf: Path | None
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None


def model_name(source: str) -> str:
    """The name of the model that `source` names: a file's stem, a directory's name or a Hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.suffix == ".gguf" else source


def find_model_files(source: str) -> ModelFiles:
    """Finds the files of a Hugging Face model directory, a .gguf file, a directory that holds one, or a Hub id.

    Raises:
        ConfigError: if there is no such model, or nothing in it to make a tokenizer from.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _in_directory(path.parent, model_name(source), path)
    if path.is_dir():
        return _in_directory(path, model_name(source), _only_gguf(path))
    if _HUB_ID.fullmatch(source) and path.suffix != ".gguf":
        return _in_directory(_downloaded(source), source, None)
    raise ConfigError(f"{source}: no such file or directory: name a model directory, a .gguf file or a Hub id")


def _in_directory(directory: Path, name: str, gguf: Path | None) -> ModelFiles:
    tokenizer_json = directory / "tokenizer.json"
    if not tokenizer_json.is_file():
        if gguf is None:
            raise ConfigError(
                f"{directory}: holds neither tokenizer.json nor a .gguf file: add the model's tokenizer.json"
            )
        return ModelFiles(name, None, gguf)
    template = directory / "chat_template.jinja"
    return ModelFiles(
        name,
        tokenizer_json,
        gguf,
        _read_json(directory / "tokenizer_config.json"),
        _read_json(directory / "config.json"),
        _read_json(directory / "generation_config.json"),
        template.read_text(encoding="utf-8") if template.is_file() else None,
    )


def _only_gguf(directory: Path) -> Path | None:
    files = sorted(directory.glob("*.gguf"))
    if len(files) > 1 and not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"{directory}: holds {len(files)} .gguf files: name the one to serve")
    return files[0] if files else None


def _downloaded(repo_id: str) -> Path:
    # Imported where it is used: it takes longer than all the rest of the router, and most models are local.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(_TEXT_FILES)))
    except (OSError, HFValidationError) as error:
        # The Hub's errors are long; the first line says what happened.
        cause = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{repo_id}: no such path here, and not to be had from the Hugging Face Hub ({cause}): "
            "check the name and the network, or download the model and name its directory"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_JSON_BYTES} bytes: this is no model's file")
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}): get the file anew") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: must hold a JSON object: get the file anew")
    return fields
