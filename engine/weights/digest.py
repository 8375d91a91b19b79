"""A digest that tells models apart, cheap enough for files of any size."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from engine.weights.checkpoint import Checkpoint
from pdmesh.errors import ConfigError

_SAMPLE_BYTES = 64 * 1024
# Files of up to 4 MiB are read in full; of larger ones, first and last pieces and those evenly between.
_MAX_SAMPLES = 64


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
            for offset in _sample_offsets(size):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error


def _sample_offsets(size: int) -> list[int]:
    if size <= _MAX_SAMPLES * _SAMPLE_BYTES:
        return list(range(0, size, _SAMPLE_BYTES))
    last = size - _SAMPLE_BYTES
    return [last * sample // (_MAX_SAMPLES - 1) for sample in range(_MAX_SAMPLES)]
