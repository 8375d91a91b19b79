"""A block pool as values, with the rules of engine/block_pool.py: what is free, held, committed and cached.

tests/unit/engine/test_block_pool_handoffs.py does the like to the pool itself.
"""

from collections.abc import Iterable, Sequence

from tests.model.explore import Violation
from tests.model.world import NO_HASH, Block, Blocks


def put(blocks: Blocks, block_id: int, block: Block) -> Blocks:
    return (*blocks[:block_id], block, *blocks[block_id + 1 :])


def find(blocks: Blocks, tokens: int) -> int | None:
    """The block that is committed under these tokens."""
    return next((block_id for block_id, block in enumerate(blocks) if block.tokens == tokens), None)


def take(blocks: Blocks, wanted: Sequence[int], holder: int) -> tuple[Blocks, tuple[int, ...]] | None:
    """A block for each of `wanted`: the one that is committed under these tokens, or a free one to write to.

    Pass NO_HASH for one to write to in any case. None where there are not enough.
    """
    block_ids = [find(blocks, tokens) if tokens != NO_HASH else None for tokens in wanted]
    for block_id in block_ids:
        if block_id is not None:
            block = blocks[block_id]
            blocks = put(blocks, block_id, block._replace(holders=tuple(sorted((*block.holders, holder)))))
    for place, found in enumerate(block_ids):
        if found is None:
            free = [block_id for block_id, block in enumerate(blocks) if not block.holders]
            if not free:
                return None
            # What is cached is reused last.
            block_id = min(free, key=lambda block_id: blocks[block_id].tokens != NO_HASH)
            block_ids[place] = block_id
            blocks = put(blocks, block_id, Block((holder,), NO_HASH, blocks[block_id].content))
    return blocks, tuple(block_id for block_id in block_ids if block_id is not None)


def free(blocks: Blocks, block_ids: Iterable[int], holder: int) -> Blocks:
    for block_id in block_ids:
        block = blocks[block_id]
        if holder not in block.holders:
            raise Violation(f"block {block_id} is freed by {holder}, who does not hold it")
        holders = list(block.holders)
        holders.remove(holder)
        blocks = put(blocks, block_id, block._replace(holders=tuple(holders)))
    return blocks


def write(blocks: Blocks, block_id: int, content: int, holder: int) -> Blocks:
    block = blocks[block_id]
    if block.tokens != NO_HASH:
        raise Violation(f"block {block_id} changes while it is committed under {block.tokens}")
    if block.holders != (holder,):
        raise Violation(f"use after free: {holder} writes block {block_id}, which is held by {block.holders}")
    return put(blocks, block_id, block._replace(content=content))


def commit(blocks: Blocks, block_id: int, tokens: int, holder: int) -> Blocks:
    block = blocks[block_id]
    if holder not in block.holders:
        raise Violation(f"{holder} commits block {block_id}, which it does not hold")
    if block.content != tokens:
        raise Violation(f"block {block_id} is committed under {tokens} and holds {block.content}")
    if find(blocks, tokens) is not None:
        # That one stays in the index; this one is its holder's alone.
        return blocks
    return put(blocks, block_id, block._replace(tokens=tokens))
