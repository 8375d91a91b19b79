"""The file of results, in the order of the input, and how it goes on after a process that died.

    out.jsonl          results 0 … num_written - 1, one a line; it only grows
    out.jsonl.ahead    results that finished before their turn, in the order in which they did; gone at the end

A result is written as soon as it is there, to one or the other, with one call and no buffer: whatever kills the
process, at most the line that is being written is torn, and that one is dropped. The file beside the output grows to
the output's size at most, and is emptied whenever nothing is ahead.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pdmesh.batch.input_file import InputFile
from pdmesh.batch.result_line import beginning, place, succeeded, torn
from pdmesh.errors import ConfigError


class OutputFile:
    """Opens what belongs to `source`, or begins it. A context manager: leaving it closes the files.

    Locked against a second process while it is open.

    Attributes:
        path: The output.
        num_written: Results in the output: all requests before this index have one there.
        num_finished: Those and the ones that are ahead of their turn.
        num_failed: How many of these are errors.

    Raises:
        ConfigError: if the output belongs to another input or version of it, is no output of ours, is in use, or
            cannot be written.
    """

    def __init__(self, path: Path, source: InputFile) -> None:
        self.path = path
        self.num_written = 0
        self.num_failed = 0
        self._source = source
        # Index of each result that is ahead, and where it lies: offset and bytes.
        self._ahead: dict[int, tuple[int, int]] = {}
        self._ahead_path = path.with_name(path.name + ".ahead")
        self._files = contextlib.ExitStack()
        with self._files, _told(path):
            if not path.exists():
                self._forget_ahead()
            self._out = self._open(path)
            self._take()
            self._recover_written()
            self._ahead_file = self._open(self._ahead_path)
            self._recover_ahead()
            self._move()
            self._files = self._files.pop_all()

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._files:
            if not self._ahead:
                self._ahead_path.unlink(missing_ok=True)

    @property
    def num_finished(self) -> int:
        return self.num_written + len(self._ahead)

    def has(self, index: int) -> bool:
        """Whether request `index` has its result."""
        return index < self.num_written or index in self._ahead

    def add(self, index: int, line: bytes, *, failed: bool) -> None:
        """Takes the result of a request that had none. On return it survives the process.

        Raises ConfigError where it cannot be written.
        """
        assert not self.has(index), f"request {index} has its result"
        with _told(self.path):
            if index == self.num_written:
                _write(self._out, line)
                self.num_written += 1
                self._move()
            else:
                offset = os.fstat(self._ahead_file.fileno()).st_size
                _write(self._ahead_file, line)
                self._ahead[index] = offset, len(line)
        self.num_failed += failed

    def _open(self, path: Path) -> BinaryIO:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        return self._files.enter_context(open(descriptor, "rb+", buffering=0))

    def _take(self) -> None:
        status = os.fstat(self._out.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{self.path} is no regular file: results are read again to go on, so name one")
        if os.path.samestat(status, self._source.path.stat()):
            raise ConfigError(f"{self.path} is the input: name another file for the results")
        try:
            fcntl.flock(self._out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process writes {self.path}: wait for it, or name another file") from error

    def _recover_written(self) -> None:
        """Checks every line; drops the last one if it is torn."""
        with open(self._out.fileno(), "rb", closefd=False) as file:
            while True:
                offset = file.tell()
                expected = beginning(self._source.digest, self.num_written)
                # Not by lines: a foreign file may be one line of gigabytes.
                begun = file.read(len(expected))
                if not begun:
                    return
                if self.num_written == self._source.num_requests or not expected.startswith(begun):
                    raise self._foreign(self.path, self.num_written + 1)
                line = begun + file.readline()
                success = succeeded(line)
                if success is None and not line.endswith(b"\n"):
                    os.ftruncate(self._out.fileno(), offset)
                    return
                if success is None:
                    raise self._foreign(self.path, self.num_written + 1)
                self.num_written += 1
                self.num_failed += not success
                if not line.endswith(b"\n"):
                    _write(self._out, b"\n")
                    return

    def _recover_ahead(self) -> None:
        number = end = 0
        with open(self._ahead_file.fileno(), "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                success = succeeded(line)
                if success is None and torn(line, self._source.digest):
                    break
                digest, index = place(line) or ("", 0)
                if success is None or digest != self._source.digest or index >= self._source.num_requests:
                    raise self._foreign(self._ahead_path, number)
                if not self.has(index):
                    self._ahead[index] = end, len(line.rstrip(b"\n")) + 1
                    self.num_failed += not success
                end += len(line)
                if not line.endswith(b"\n"):
                    _write(self._ahead_file, b"\n")
                    return
        os.ftruncate(self._ahead_file.fileno(), end)

    def _forget_ahead(self) -> None:
        """Whoever removed the output begins anew."""
        if not self._ahead_path.exists():
            return
        with self._ahead_path.open("rb") as file:
            begun = file.read(100)
        if begun and place(begun) is None:
            raise ConfigError(f"{self._ahead_path} is in the way: remove it, or name another output file")
        self._ahead_path.unlink()

    def _move(self) -> None:
        """Brings the results whose turn has come into the output."""
        while found := self._ahead.get(self.num_written):
            offset, num_bytes = found
            _write(self._out, os.pread(self._ahead_file.fileno(), num_bytes, offset))
            del self._ahead[self.num_written]
            self.num_written += 1
            if not self._ahead:
                os.ftruncate(self._ahead_file.fileno(), 0)

    def _foreign(self, path: Path, number: int) -> ConfigError:
        return ConfigError(
            f"{path}: line {number} is no result of {self._source.path} as it is now: the input has changed, or the "
            "output is another's; put the input back, or name another output file"
        )


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {error.filename or path}: {error.strerror}; mend that, and the same command goes on after "
            "the results that are there"
        ) from error


def _write(file: BinaryIO, line: bytes) -> None:
    # A full disk takes a part first and says so only then.
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(file.fileno(), rest) :]
