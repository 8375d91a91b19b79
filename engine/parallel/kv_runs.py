"""Which bytes of a KV block the ranks of a node hold; the order of a block's bytes is engine/kv_cache.py's."""

from collections.abc import Iterable

from engine.parallel.shard import Shard
from pdmesh.types import BlockRun


def held_runs(shards: Iterable[Shard], num_layers: int, layer_bytes: int) -> tuple[BlockRun, ...]:
    """The bytes of one block that any of these shards computes, in as few runs as can be.

    Args:
        num_layers: Of the model.
        layer_bytes: K and V of one head and one layer.
    """
    runs: list[BlockRun] = []
    pieces = {
        BlockRun((head * num_layers + shard.layers.start) * layer_bytes, len(shard.layers) * layer_bytes)
        for shard in shards
        for head in shard.kv_heads
    }
    for piece in sorted(pieces):
        if runs and runs[-1].end_bytes == piece.offset_bytes:
            runs[-1] = BlockRun(runs[-1].offset_bytes, runs[-1].num_bytes + piece.num_bytes)
        else:
            runs.append(piece)
    return tuple(runs)
