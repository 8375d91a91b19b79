"""A digest that tells models apart, cheap enough for files of any size."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from engine.weights.checkpoint import Checkpoint
from pdmesh.errors import ConfigError

# Files up to this size are read in full; of larger ones, their first and last pieces and those evenly between.
_SMALL_BYTES = 4 << 20
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 16 << 10


def model_digest(checkpoint: Checkpoint) -> str:
    """SHA-256, in hex, over config, tensor names, shapes and encodings, file sizes and samples of each file's bytes.

    The model's name and the place of its files take no part: copies are equal. Raises ConfigError where a file
    cannot be read.
    """
    config = asdict(checkpoint.config)
    del config["name"]
    tensors = sorted((tensor.name, tensor.shape, tensor.encoding) for tensor in checkpoint.tensors.values())
    digest = hashlib.sha256(json.dumps([config, tensors], sort_keys=True).encode())
    for file in checkpoint.files:
        _update_with_file(digest, file)
    return digest.hexdigest()


def _update_with_file(digest: "hashlib._Hash", path: Path) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            # Else the system reads megabytes around each sample, in small pages.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            size = file.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            for offset, num_bytes in _samples(size):
                file.seek(offset)
                digest.update(file.read(num_bytes))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error


def _samples(size: int) -> list[tuple[int, int]]:
    """Offset and length of each."""
    if size <= _SMALL_BYTES:
        return [(0, size)]
    last = size - _SAMPLE_BYTES
    return [(last * sample // (_NUM_SAMPLES - 1), _SAMPLE_BYTES) for sample in range(_NUM_SAMPLES)]
