"""Identity of KV blocks: SHA-256 chained over parent, token ids, tenant salt and adapter.

Two blocks with the same hash hold the KV of the same tokens after the same prefix, for the same salt. Sixteen bytes
of the digest travel: 2^-64 per pair of blocks that an honest collision happens, and finding one needs 2^64 work.
"""

import array
import hashlib
from collections.abc import Sequence
from itertools import islice
from typing import NewType

BlockHash = NewType("BlockHash", bytes)

HASH_BYTES = 16


def root_hash(cache_salt: bytes = b"", adapter: str = "") -> BlockHash:
    """Parent of a prompt's first block: what keeps tenants and adapters apart."""
    digest = hashlib.sha256(b"pdmesh.v1\0")
    for part in (cache_salt, adapter.encode()):
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part)
    return BlockHash(digest.digest()[:HASH_BYTES])


def block_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of one full block of `token_ids` (each below 2^32) after `parent`."""
    digest = hashlib.sha256(parent)
    digest.update(array.array("I", token_ids).tobytes())
    return BlockHash(digest.digest()[:HASH_BYTES])


def block_hashes(token_ids: Sequence[int], block_size: int, parent: BlockHash) -> list[BlockHash]:
    """Hashes of the full blocks of `token_ids`, first to last; a partial last block has none."""
    hashes = []
    tokens = iter(token_ids)
    for _ in range(len(token_ids) // block_size):
        parent = block_hash(parent, list(islice(tokens, block_size)))
        hashes.append(parent)
    return hashes


def sequence_hashes(token_ids: Sequence[int], block_size: int, parent: BlockHash) -> list[BlockHash]:
    """As `block_hashes`, and one more for a partial last block: what its KV is of, though no cache knows it by that."""
    hashes = block_hashes(token_ids, block_size, parent)
    tail = token_ids[len(hashes) * block_size :]
    return [*hashes, block_hash(hashes[-1] if hashes else parent, tail)] if tail else hashes
