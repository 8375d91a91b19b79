"""The file of requests: read once as a whole before anything is sent, then line by line."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pdmesh.batch.request_line import custom_id_of
from pdmesh.channels import MAX_MESSAGE_BYTES
from pdmesh.errors import ConfigError

# A longer line makes a message that no router takes.
MAX_LINE_BYTES = MAX_MESSAGE_BYTES

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One request as it stands in the file; blank lines are none.

    Attributes:
        index: Its place among the requests, from 0: that of its result in the output.
        number: Of its line, from 1, for messages.
        content: None where it is longer than MAX_LINE_BYTES.
    """

    index: int
    number: int
    content: bytes | None


class InputFile:
    """Opens `path` and reads it through. A context manager: leaving it closes the file.

    Holds the custom_ids in memory while it reads, and nothing of the requests.

    Attributes:
        digest: Of all its bytes, 16 hexadecimal digits of SHA-256.
        num_requests: How many results there will be.

    Raises:
        ConfigError: if the file cannot be read, holds no request, or has a custom_id twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():
                raise ConfigError(f"{path}: no such file; name one that holds a request in each line")
            self._file = path.open("rb")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        try:
            self._stamp = self._stamp_now()
            self.digest, self.num_requests = self._read_through()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "InputFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def lines(self, start: int = 0) -> Iterator[Line]:
        """The requests from index `start` on. One such iterator at a time.

        Raises ConfigError where somebody has written to the file since it was read through.
        """
        self._file.seek(0)
        for line in _lines(self._file, lambda _: None):
            if line.index < start:
                continue
            if self._stamp_now() != self._stamp:
                raise ConfigError(
                    f"{self.path} was changed while it was run: put back what it was, and the same command goes on"
                )
            yield line

    def _stamp_now(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _read_through(self) -> tuple[str, int]:
        digest = hashlib.sha256()
        line_numbers: dict[str, int] = {}
        num_requests = 0
        for line in _lines(self._file, digest.update):
            num_requests += 1
            custom_id = custom_id_of(line.content)
            if custom_id is None:
                continue
            first = line_numbers.setdefault(custom_id, line.number)
            if first != line.number:
                raise ConfigError(
                    f"{self.path}: line {line.number} has the custom_id {custom_id!r} of line {first}: "
                    "give each request its own"
                )
        if not num_requests:
            raise ConfigError(f"{self.path} holds no request: put one into each line")
        return digest.hexdigest()[:16], num_requests


def _lines(file: IO[bytes], see: Callable[[bytes], object]) -> Iterator[Line]:
    """The requests of `file` from where it stands; `see` gets every byte."""
    index = number = 0
    while piece := file.readline(MAX_LINE_BYTES + 1):
        see(piece)
        number += 1
        content: bytes | None = piece.removeprefix(_BYTE_ORDER_MARK) if number == 1 else piece
        while len(piece) > MAX_LINE_BYTES and not piece.endswith(b"\n"):
            content = None
            piece = file.readline(MAX_LINE_BYTES + 1)
            see(piece)
        if content is None or content.strip():
            yield Line(index, number, content)
            index += 1
