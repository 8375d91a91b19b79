"""The header of a GGUF file: its metadata, and where its tensors lie.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

A vocabulary and its merges are some hundred thousand strings. They are read straight from the mapped file, which takes
a few tenths of a second where the gguf library takes more than two, once in every process of a cluster. Every length is
held against the file's size before anything is made of it.
"""

import mmap
import struct
from dataclasses import dataclass, replace
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
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)


# Of fields, tensors, and values in an array: more than any vocabulary has.
_MAX_COUNT = 2**22
# ggml allows no more dimensions.
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        shape: Outermost dimension first, as torch counts them; the file says it the other way round.
        type_id: ggml's number of its encoding.
        offset: Of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself.

    Attributes:
        tensors: In the order of the file.
        values_begin: Offset of the tensors' values.
        alignment: Of each tensor's offset, in bytes, counted from there.
    """

    metadata: dict[str, GgufValue]
    tensors: tuple[GgufTensor, ...]
    values_begin: int
    alignment: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads all but the tensors' values.

    Raises:
        ConfigError: if the file is no GGUF file of version 2 or 3, or is damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ConfigError(f"{path}: not a GGUF file (it does not begin with GGUF): name the right file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_header(data, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path}: damaged or cut short ({error}): get the file anew") from error


def _read_header(data: mmap.mmap, path: Path) -> GgufHeader:
    _, version, num_tensors, num_pairs = _HEADER.unpack_from(data)
    if version not in _VERSIONS:
        raise ConfigError(f"{path}: a GGUF file of version {version}; known are 2 and 3: convert the model anew")
    if num_pairs > _MAX_COUNT or num_tensors > _MAX_COUNT:
        raise ValueError(f"{num_pairs} fields and {num_tensors} tensors")
    metadata: dict[str, GgufValue] = {}
    position = _HEADER.size
    for _ in range(num_pairs):
        key, position = _read_string(data, position)
        (kind,) = _U32.unpack_from(data, position)
        metadata[key], position = _read_value(data, position + _U32.size, kind, nested=False)
    tensors = []
    for _ in range(num_tensors):
        tensor, position = _read_tensor(data, position)
        tensors.append(tensor)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment}")
    values_begin = -(-position // alignment) * alignment
    placed = tuple(replace(tensor, offset=values_begin + tensor.offset) for tensor in tensors)
    return GgufHeader(metadata, placed, values_begin, alignment)


def _read_tensor(data: mmap.mmap, position: int) -> tuple[GgufTensor, int]:
    """Its offset counts from where the tensors' values begin."""
    name, position = _read_string(data, position)
    (num_dimensions,) = _U32.unpack_from(data, position)
    if num_dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} of {num_dimensions} dimensions")
    shape = struct.unpack_from(f"<{num_dimensions}Q", data, position + _U32.size)
    position += _U32.size + num_dimensions * _U64.size
    (type_id,) = _U32.unpack_from(data, position)
    (offset,) = _U64.unpack_from(data, position + _U32.size)
    return GgufTensor(name, tuple(reversed(shape)), type_id, offset), position + _U32.size + _U64.size


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
    if count > _MAX_COUNT:
        raise ValueError(f"an array of {count} values")
    if (scalar := _SCALARS.get(kind)) is not None:
        numbers = struct.Struct(f"<{count}{scalar.format[1:]}")
        return list(numbers.unpack_from(data, position)), position + numbers.size
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
