"""The files of a model that tell how its text works, found from what a person names. Weights are never read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdmesh.errors import ConfigError
from pdmesh.model_source import files_can_be_read, find_model, model_name

# All that is fetched from the Hub.
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
)
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


def find_model_files(source: str) -> ModelFiles:
    """Finds the text's files of what a person named; see pdmesh/model_source.py.

    Raises:
        ConfigError: if there is no such model, or nothing in it to make a tokenizer from.
    """
    with files_can_be_read(source):
        path = find_model(source, _TEXT_FILES)
        if path.is_file():
            return _in_directory(path.parent, model_name(source), path)
        return _in_directory(path, model_name(source), None)


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
        _read_text(template) if template.is_file() else None,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8 ({error}): get the file anew") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_JSON_BYTES} bytes: this is no model's file")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}): get the file anew") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: must hold a JSON object: get the file anew")
    return fields
