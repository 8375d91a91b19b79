"""What Linux says of a process's memory (proc(5)), in bytes."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process.

    Attributes:
        resident: All of its pages in memory, however many processes share them; `most_resident` at its most so far.
        share: As `resident`, each page divided by the number of processes that have it (Pss).
        anonymous: Of `share`, what lies in no file.
        shared: Of `share`, what lies in memory files.
    """

    resident: int
    most_resident: int
    share: int
    anonymous: int
    shared: int


def memory_of(pid: int) -> Memory:
    """Raises OSError where there is no such process, or none of this user's."""
    directory = Path(f"/proc/{pid}")
    return parse_memory((directory / "status").read_text(), (directory / "smaps_rollup").read_text())


def parse_memory(status: str, smaps_rollup: str) -> Memory:
    own, rollup = _kib(status), _kib(smaps_rollup)
    return Memory(
        resident=own["VmRSS"] << 10,
        most_resident=own["VmHWM"] << 10,
        share=rollup["Pss"] << 10,
        anonymous=rollup["Pss_Anon"] << 10,
        shared=rollup["Pss_Shmem"] << 10,
    )


def _kib(text: str) -> dict[str, int]:
    """Of lines `Name:  123 kB`."""
    fields = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in fields if len(words) == 3 and words[2] == "kB"}
