"""Values as every table of ours says them."""

from pdmesh.types import PairingFacts, WorkerInfo


def role(info: WorkerInfo) -> str:
    """The role, and the degrees of a worker with several ranks: decode TP 2."""
    degrees = (("TP", info.tp_size), ("PP", info.pp_size))
    return " ".join((info.role.value, *(f"{name} {size}" for name, size in degrees if size > 1)))


def precision(facts: PairingFacts) -> str:
    """What a worker computes in, and its weights' bits where these are fewer: bfloat16, int4 weights."""
    return facts.dtype if facts.quantization == "none" else f"{facts.dtype}, {facts.quantization} weights"


def size(num_bytes: float) -> str:
    """In decimal units."""
    for unit_bytes, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def uptime(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
