"""A process that writes blocks as fast as it can is killed, and another opens what it left.

    python -m tests.unit.kvstore.test_disk_tier_killed DIRECTORY FIRST

is the process: it prints each block's number once the block is written.
"""

import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest

from kvstore.tiers.disk import DiskTier
from tests.tier_blocks import FACTS, content, empty_view, key

BLOCK_BYTES = 200_000
NUM_BLOCKS = 16


def open_tier(root: Path) -> DiskTier:
    return DiskTier(root, FACTS, BLOCK_BYTES, NUM_BLOCKS)


def write_until_killed(root: Path, first: int) -> None:
    tier = open_tier(root)
    for n in count(first):
        assert tier.put(key(n), memoryview(content(key(n), BLOCK_BYTES)))
        print(n, flush=True)


@pytest.mark.parametrize("written_s", [0.0, 0.05, 0.2])
def test_what_was_written_before_a_kill_is_served_and_nothing_wrong(tmp_path: Path, written_s: float) -> None:
    first = 0
    # The second life begins with full slots, so that each write destroys a block first.
    for _ in range(2):
        command = [sys.executable, "-m", __spec__.name, str(tmp_path), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            reported = [int(child.stdout.readline()) for _ in range(NUM_BLOCKS)]
            time.sleep(written_s)
            child.kill()
            reported += [int(line) for line in child.stdout]
        assert child.returncode == -signal.SIGKILL
        first = reported[-1] + 2
        with closing(open_tier(tmp_path)) as tier:
            # The write that was cut short had taken the oldest block's slot, or was whole and not yet reported.
            for n in reported[-NUM_BLOCKS + 1 :]:
                assert key(n) in tier
            view = empty_view(BLOCK_BYTES)
            served = [n for n in range(first) if tier.get(key(n), view) and view == content(key(n), BLOCK_BYTES)]
            assert set(served) >= set(reported[-NUM_BLOCKS + 1 :])
            assert len(served) == tier.stats().num_hits, "every block that was served is right"
            assert tier.stats().num_corrupt == 0
            tier.check_invariants()


if __name__ == "__main__":
    write_until_killed(Path(sys.argv[1]), int(sys.argv[2]))
