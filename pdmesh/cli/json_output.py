"""Our values as JSON."""

import json
from dataclasses import asdict, is_dataclass
from enum import Enum


def to_json(value: object, *, indent: int | None = None) -> str:
    """Dataclasses become objects, enums their values."""
    return json.dumps(value, default=_plain, ensure_ascii=False, indent=indent)


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")
