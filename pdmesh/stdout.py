"""This process's standard output."""

import os
import sys


def discard_stdout() -> None:
    """For when whoever read it has enough: nothing more may be written there, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
