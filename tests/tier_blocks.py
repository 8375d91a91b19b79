"""Blocks for tests of the tiers: block n has hash n and bytes that follow from n."""

import hashlib

from pdmesh.hashing import HASH_BYTES, BlockHash
from pdmesh.types import PairingFacts

# Not a multiple of the alignment on disk.
BLOCK_BYTES = 5000
FACTS = PairingFacts("digest", "float32", "float32", 16, 2, 2, 8, "layer,kv,head,token,dim")


def key(n: int) -> BlockHash:
    return BlockHash(n.to_bytes(HASH_BYTES, "little"))


def keys(*numbers: int) -> list[BlockHash]:
    return [key(n) for n in numbers]


def content(block_hash: BlockHash, num_bytes: int = BLOCK_BYTES) -> bytes:
    return hashlib.shake_128(block_hash).digest(num_bytes)


def block(n: int) -> memoryview:
    return memoryview(content(key(n)))


def empty_view(num_bytes: int = BLOCK_BYTES) -> memoryview:
    return memoryview(bytearray(num_bytes))


def empty_views(num_blocks: int) -> list[memoryview]:
    return [empty_view() for _ in range(num_blocks)]
