"""Whether what is to be loaded has room, by arithmetic and before any of it is allocated."""

import torch

from engine.config import available_memory_bytes
from pdmesh.errors import ConfigError


def check_room(source: str, num_bytes: int, dtype: str, device: torch.device) -> None:
    """Raises ConfigError where `num_bytes` of parameters in `dtype` are more than is free on `device`.

    A system that hands out memory as it is written would end the process in the middle of loading, and say nothing.
    """
    free_bytes = available_memory_bytes(device)
    if num_bytes > free_bytes:
        raise ConfigError(
            f"{source}: its weights take {num_bytes / 2**30:.2f} GiB in {dtype} and {free_bytes / 2**30:.2f} GiB are "
            f"free on {device}: `pdmesh model inspect {source}` says what would fit"
        )
