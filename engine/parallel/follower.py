"""Every rank but the first: a process that loads its shard, and then computes the steps that the leader names."""

import logging
from collections.abc import Callable
from dataclasses import replace

from engine.assembly import ModelLoader, load_part
from engine.batch import Batch
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.loader import load_model
from engine.parallel.exchange import GroupDownError
from engine.parallel.group import RankGroup
from engine.parallel.staging import copy_region
from engine.parallel.wire import Serve, Serving, Stage, Staged

log = logging.getLogger(__name__)


def follow(
    config: EngineConfig,
    group: RankGroup,
    load: ModelLoader = load_model,
    move_kv: Callable[[KVCache], tuple[str, tuple[tuple[str, str], ...]]] | None = None,
) -> None:
    """Serves steps until the leader closes the connection. Blocks.

    Args:
        move_kv: Called where this rank is to move the KV of its node, which is not the leader's. Returns at what
            address it does, and the names and addresses of the transports on which it receives.

    Raises:
        ConfigError: where the model cannot be loaded or has no room.
        GroupDownError: where another rank is lost.
        Exception: that a step failed with; the group cannot go on after it.
    """
    leader = group.to_leader()
    part = load_part(config, load, lambda done, total: None, group)
    leader.send(part.loaded)
    serve = leader.receive()
    if serve is None:
        return
    if not isinstance(serve, Serve):
        raise GroupDownError("rank 0 sent a step before it said how many blocks there are")
    made = part.make(serve)
    info = made.info
    serving = Serving(info.host, info.pid, info.kv_bytes)
    if move_kv is not None and group.moves_kv:
        address, offers = move_kv(made.kv_cache)
        runs = tuple((run.offset_bytes, run.num_bytes) for run in made.kv_runs)
        serving = replace(serving, kv_address=address, kv_runs=runs, kv_offers=offers)
    leader.send(serving)
    if leader.receive() is None:
        return
    if group.moves_kv:
        made.seal_kv()
    while (message := leader.receive()) is not None:
        match message:
            case Batch():
                made.rank.run(message)
                for rows in message.logit_rows:
                    made.rank.logits(rows)
            case Stage():
                copy_region(made.kv_cache, message)
                leader.send(Staged())
            case _:
                raise GroupDownError(f"rank 0 sent {type(message).__name__} in place of a step")
