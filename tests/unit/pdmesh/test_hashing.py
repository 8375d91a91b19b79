"""Block hashes: fixed for good, since workers of several versions must agree on them."""

import hashlib
import struct

from pdmesh.hashing import HASH_BYTES, block_hash, block_hashes, root_hash


def test_known_answers() -> None:
    root = root_hash()
    assert root.hex() == hashlib.sha256(b"pdmesh.v1\0" + bytes(8)).hexdigest()[:32]
    expected = hashlib.sha256(root + struct.pack("<4I", 1, 2, 3, 2**32 - 1)).digest()[:HASH_BYTES]
    assert block_hash(root, [1, 2, 3, 2**32 - 1]) == expected
    assert expected.hex() == "d4007e5d8b9d29bd9582adb4aae621ec"


def test_blocks_chain_and_the_rest_has_no_hash() -> None:
    root = root_hash()
    first, second = block_hashes(range(11), 4, root)
    assert first == block_hash(root, range(4))
    assert second == block_hash(first, range(4, 8))


def test_the_same_tokens_after_another_prefix_are_another_block() -> None:
    one, other = block_hashes([1, 2, 9, 9], 2, root_hash()), block_hashes([1, 3, 9, 9], 2, root_hash())
    assert one[1] != other[1]


def test_salt_and_adapter_keep_apart() -> None:
    roots = {
        root_hash(),
        root_hash(b"a"),
        root_hash(b"", "a"),
        root_hash(b"a", "b"),
        root_hash(b"ab"),
        root_hash(b"", "ab"),
    }
    assert len(roots) == 6


def test_too_short_a_prompt_has_no_block() -> None:
    assert block_hashes([1, 2, 3], 4, root_hash()) == []
