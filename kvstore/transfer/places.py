"""Parts of the transports whose receiver pulls: not the bytes, but where each block begins in the sender's memory."""

import struct
from collections.abc import Sequence

from kvstore.transfer.base import BlockMemory, crc32c
from kvstore.transfer.connection import Connection
from kvstore.transfer.frames import Frame, FrameType
from kvstore.transfer.tcp import check_part, send_crc
from pdmesh.errors import CorruptionError
from pdmesh.hashing import BlockHash

MAX_BLOCKS_PER_PART = 512


def blocks_per_part(block_bytes: int, part_bytes: int) -> int:
    """How many blocks make a part of about `part_bytes`; at least one."""
    return max(1, min(MAX_BLOCKS_PER_PART, part_bytes // block_bytes))


def send_places(
    connection: Connection, memory: BlockMemory, first: int, block_ids: Sequence[int], block_hash: BlockHash
) -> int:
    """Sends a PART. Returns the bytes of its blocks."""
    places = struct.pack(f"<{len(block_ids)}Q", *map(memory.place, block_ids))
    frame = Frame(FrameType.PART, first, len(block_ids), len(places), block_hash)
    connection.send([frame.pack(), places])
    # While the receiver copies.
    send_crc(connection, crc32c([memory.view(block_id) for block_id in block_ids]))
    return len(block_ids) * memory.block_bytes


def receive_places(connection: Connection, frame: Frame, block_bytes: int, memory_bytes: int) -> tuple[int, ...]:
    """The body of a PART: where its blocks begin, in bytes from the beginning of the sender's memory.

    Raises CorruptionError for more blocks than a part may have, or one that lies outside of the `memory_bytes`.
    """
    if frame.count > MAX_BLOCKS_PER_PART:
        raise CorruptionError(f"a part of {frame.count} blocks", reason="KV_OUT_OF_RANGE", stage="transfer")
    check_part(frame, block_bytes, body_bytes=8 * frame.count)
    places = struct.unpack(f"<{frame.count}Q", connection.receive_body(frame.num_bytes))
    if max(places) + block_bytes > memory_bytes:
        raise CorruptionError("a block outside the sender's memory", reason="KV_OUT_OF_RANGE", stage="transfer")
    return places
