"""The metadata of a GGUF file, tensors left alone.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

A vocabulary and its merges are some hundred thousand strings. They are read straight from the mapped file, which takes
a tenth of a second; every length is held against the file's size before anything is made of it.
"""

import mmap
import struct
from pathlib import Path

from pdmesh.errors import ConfigError

GgufValue = int | float | bool | str | list["GgufValue"]

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING = 8
_ARRAY = 9
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_HEADER = struct.Struct("<4sIQQ")
_VERSIONS = (2, 3)


def read_gguf_metadata(path: Path) -> dict[str, GgufValue]:
    """All key-value pairs of the file's header.

    Raises:
        ConfigError: if the file is no GGUF file of version 2 or 3, or is damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(data, path)
    except (struct.error, UnicodeDecodeError, ValueError, OSError) as error:
        raise ConfigError(f"{path}: no GGUF file, or a damaged one ({error}): get the file anew") from error


def _read_header(data: mmap.mmap, path: Path) -> dict[str, GgufValue]:
    magic, version, _, num_pairs = _HEADER.unpack_from(data)
    if magic != b"GGUF" or version not in _VERSIONS:
        raise ConfigError(f"{path}: not a GGUF file of version 2 or 3: name the right file")
    metadata: dict[str, GgufValue] = {}
    position = _HEADER.size
    for _ in range(num_pairs):
        key, position = _read_string(data, position)
        (kind,) = _U32.unpack_from(data, position)
        metadata[key], position = _read_value(data, position + _U32.size, kind, nested=False)
    return metadata


def _read_value(data: mmap.mmap, position: int, kind: int, *, nested: bool) -> tuple[GgufValue, int]:
    if kind == _STRING:
        return _read_string(data, position)
    if kind == _ARRAY:
        if nested:
            raise ValueError("an array of arrays")
        return _read_array(data, position)
    scalar = _SCALARS.get(kind)
    if scalar is None:
        raise ValueError(f"a value of unknown type {kind}")
    return scalar.unpack_from(data, position)[0], position + scalar.size


def _read_array(data: mmap.mmap, position: int) -> tuple[GgufValue, int]:
    (kind,) = _U32.unpack_from(data, position)
    (count,) = _U64.unpack_from(data, position + _U32.size)
    position += _U32.size + _U64.size
    # The shortest value of any type takes one byte.
    if count > len(data) - position:
        raise ValueError(f"an array of {count} values reaches past the end of the file")
    values: list[GgufValue] = []
    for _ in range(count):
        value, position = _read_value(data, position, kind, nested=True)
        values.append(value)
    return values, position


def _read_string(data: mmap.mmap, position: int) -> tuple[str, int]:
    (length,) = _U64.unpack_from(data, position)
    start = position + _U64.size
    if length > len(data) - start:
        raise ValueError(f"a string of {length} bytes reaches past the end of the file")
    return data[start : start + length].decode(), start + length
