"""Runs a command that ends when its parent does, even by SIGKILL: python die_with_parent.py PARENT_PID COMMAND…

A script of its own, run by path and without site-packages, so that it starts at once. Linux tells a process of its
parent's death (prctl(2), PR_SET_PDEATHSIG), and the setting outlives exec; elsewhere the command just runs.
The parent is, to be exact, the thread that spawned: it must be one that lives as long as its process.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before prctl: then nobody would tell us any more.
    if os.getppid() != parent_pid:
        raise SystemExit(f"parent {parent_pid} is gone")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise SystemExit(f"cannot run {command[0]}: {error.strerror}") from error


if __name__ == "__main__":
    main()
