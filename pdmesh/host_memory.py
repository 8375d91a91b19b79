"""How much memory this machine, or the container around this process, has left."""

from pathlib import Path

# What is said where the system does not tell: less than any machine that serves a model has.
_UNTOLD_BYTES = 4 << 30


def available_host_bytes(mapped_bytes: int = 0) -> int:
    """Free memory of the host, within this container's limit.

    Args:
        mapped_bytes: Of files that are to stay in memory. The host calls them free: it can read them again. What a
            container has used contains them.
    """
    free = _machine_free_bytes(Path("/proc/meminfo")) - mapped_bytes
    return max(0, min(free, _cgroup_free_bytes(Path("/sys/fs/cgroup"))))


def _machine_free_bytes(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return _UNTOLD_BYTES
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup_free_bytes(cgroup: Path) -> int:
    """What control group v2 leaves this process, as in a container; without a limit, more than there can be."""
    try:
        limit, used = (cgroup / "memory.max").read_text().strip(), (cgroup / "memory.current").read_text()
    except OSError:
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - int(used))
