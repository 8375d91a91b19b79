"""What a disk tier's files hold. No I/O.

    about.json   which model's blocks, and of which size: the directory is this model's alone
    headers      one header of HEADER_BYTES per slot; zeros where the slot is free
    blocks       the blocks, each at its slot's place, ALIGNMENT bytes or a multiple apart
    lock         held by the process that has the tier open

A header, little-endian: magic, format version, CRC32C of the block, sequence number, block hash, zeros, CRC32C of all
before it. Headers lie apart from the blocks, so that a start reads a few megabytes and not one page per block.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import google_crc32c

from pdmesh.hashing import HASH_BYTES, BlockHash
from pdmesh.types import PairingFacts

HEADER_BYTES = 64
ALIGNMENT = 4096

_FORMAT_VERSION = 1
_MAGIC = b"pdmeshKV"
_FIELDS = struct.Struct(f"<8sIIQ{HASH_BYTES}s20x")
_CHECKSUM = struct.Struct("<I")
assert _FIELDS.size + _CHECKSUM.size == HEADER_BYTES


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """What a slot holds.

    Attributes:
        block_hash: Of the block.
        crc: CRC32C of its bytes.
        sequence: Counts writes to the tier: the order of use after a restart.
    """

    block_hash: BlockHash
    crc: int
    sequence: int

    def to_bytes(self) -> bytes:
        fields = _FIELDS.pack(_MAGIC, _FORMAT_VERSION, self.crc, self.sequence, self.block_hash)
        return fields + _CHECKSUM.pack(google_crc32c.value(fields))


def read_header(data: bytes) -> SlotHeader | None:
    """The header in HEADER_BYTES; None for anything that is not a whole one: free, torn or rotten."""
    fields = data[: _FIELDS.size]
    if fields[: len(_MAGIC)] != _MAGIC or _CHECKSUM.pack(google_crc32c.value(fields)) != data[_FIELDS.size :]:
        return None
    _, version, crc, sequence, block_hash = _FIELDS.unpack(fields)
    return SlotHeader(BlockHash(block_hash), crc, sequence) if version == _FORMAT_VERSION else None


def read_headers(data: bytes) -> Iterator[tuple[int, SlotHeader]]:
    """The slots in use and their headers, from the bytes of the header file; a torn tail is ignored."""
    for slot in range(len(data) // HEADER_BYTES):
        header = read_header(data[slot * HEADER_BYTES : (slot + 1) * HEADER_BYTES])
        if header is not None:
            yield slot, header


def slot_bytes(block_bytes: int) -> int:
    """Bytes from one block to the next in the block file."""
    return -(-block_bytes // ALIGNMENT) * ALIGNMENT


def slots_within(num_bytes: int, block_bytes: int) -> int:
    """How many blocks, with their headers, take at most `num_bytes` of disk."""
    return num_bytes // (slot_bytes(block_bytes) + HEADER_BYTES)


def about(facts: PairingFacts, block_bytes: int) -> str:
    """The contents of about.json."""
    description = {"format": _FORMAT_VERSION, "block_bytes": block_bytes, "facts": asdict(facts)}
    return json.dumps(description, indent=1, sort_keys=True) + "\n"


def directory_name(facts: PairingFacts, block_bytes: int) -> str:
    """The folder, below the root that models share, for blocks that may pass for one another."""
    return hashlib.sha256(about(facts, block_bytes).encode()).hexdigest()[:16]
