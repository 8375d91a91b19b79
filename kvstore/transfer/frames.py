"""Frames of the transports `tcp`, `shm` and `nixl`: a fixed header, then a body. Parsing only, no I/O.

    sender -> receiver   MEMORY  once, first; num_bytes: of the memory whose descriptor comes with it (shm; no body), or
                                 of the body, which describes the memory (nixl)
                         OPEN    body: PushOpen, serialized
                         PART    first, count: blocks by their place in the ticket; block_hash: of the last of them;
                                 body: their bytes, end to end (tcp), or where each block begins in the sender's
                                 memory, 8 bytes a block (shm, nixl); after the body, the CRC32C of the blocks' bytes,
                                 4 bytes
                         FINISH  count: parts sent; num_bytes: of all parts (no body)
    receiver -> sender   ACK     count and num_bytes: of the parts so far, all verified (no body); after OPEN and FINISH
                         NACK    body: class name of the error, its reason, its message, by newlines

All integers are little-endian. A header is checked before its body is read: nothing is allocated for a size that a peer
merely claims.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from pdmesh.errors import CorruptionError, MeshError, OverloadedError, TicketError, UnavailableError
from pdmesh.hashing import HASH_BYTES

MAGIC = 0x564B4450  # "PDKV"
VERSION = 2
MAX_CONTROL_BYTES = 4096

_HEADER = struct.Struct("<IBBxxIIQ16s")
HEADER_BYTES = _HEADER.size


class FrameType(IntEnum):
    OPEN = 1
    PART = 2
    FINISH = 3
    ACK = 4
    NACK = 5
    MEMORY = 6


@dataclass(frozen=True, slots=True)
class Frame:
    """A header. `num_bytes` is the body's length, except in FINISH, ACK and the MEMORY of shm, which have none."""

    type: FrameType
    first: int = 0
    count: int = 0
    num_bytes: int = 0
    block_hash: bytes = bytes(HASH_BYTES)

    def pack(self) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, self.type, self.first, self.count, self.num_bytes, self.block_hash)

    @classmethod
    def parse(cls, header: bytes | bytearray | memoryview) -> "Frame":
        """Raises CorruptionError for what is no frame of ours, or has a body larger than its type allows."""
        magic, version, kind, first, count, num_bytes, block_hash = _HEADER.unpack(header)
        if magic != MAGIC or version != VERSION:
            raise CorruptionError(
                f"not a KV transfer of version {VERSION}: header {bytes(header[:8]).hex()}",
                reason="KV_PROTOCOL",
                stage="transfer",
            )
        try:
            frame = cls(FrameType(kind), first, count, num_bytes, block_hash)
        except ValueError as error:
            raise CorruptionError(f"unknown frame type {kind}", reason="KV_PROTOCOL", stage="transfer") from error
        if frame.type in (FrameType.OPEN, FrameType.NACK) and num_bytes > MAX_CONTROL_BYTES:
            raise CorruptionError(
                f"{frame.type.name} frame of {num_bytes} bytes", reason="KV_PROTOCOL", stage="transfer"
            )
        return frame


_ERRORS = {cls.__name__: cls for cls in (CorruptionError, TicketError, UnavailableError, OverloadedError)}


def pack_nack(error: MeshError) -> bytes:
    """A whole NACK frame."""
    text = "\n".join((type(error).__name__, error.reason, error.message))
    body = text.encode()[:MAX_CONTROL_BYTES]
    return Frame(FrameType.NACK, num_bytes=len(body)).pack() + body


def parse_nack(body: bytes) -> MeshError:
    """The error that a NACK's body tells of; of an unknown class, UnavailableError."""
    name, reason, message = [*body.decode(errors="replace").split("\n", 2), "", ""][:3]
    return _ERRORS.get(name, UnavailableError)(message, reason=reason or None, stage="transfer")
