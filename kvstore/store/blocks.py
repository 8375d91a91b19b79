"""What a store keeps: the tiers of one model's blocks.

Of which model, the first worker that puts says; blocks of another are refused from then on. With a disk, the store
remembers it there, and serves after a restart what it kept before.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from kvstore.exchange.servicer import check_facts
from kvstore.tiers.base import Listener
from kvstore.tiers.config import TierConfig
from kvstore.tiers.stack import TierStack
from kvstore.transfer.base import BlockMemory
from pdmesh.errors import PreconditionError
from pdmesh.hashing import BlockHash
from pdmesh.tasks import settled
from pdmesh.types import MemoryFile, PairingFacts

log = logging.getLogger(__name__)

_MODEL_FILE = "model.json"


class StoreBlocks:
    """Implements kvstore.exchange.shelf.Shelf, and BlockMemory once there are blocks. Used on one event loop.

    Args:
        config: How much is kept where.
        on_open: Called when it is known of which model the blocks are.
    """

    def __init__(self, config: TierConfig, on_open: Callable[[], None]) -> None:
        self._config = config
        self._on_open = on_open
        self._listeners: list[Listener] = []
        self.facts: PairingFacts | None = None
        self.tiers: TierStack | None = None

    @property
    def memory(self) -> BlockMemory:
        return self

    def subscribe(self, listener: Listener) -> None:
        """Tells `listener` of every change, on any thread; call it before `open` and `reopen`."""
        self._listeners.append(listener)

    def reopen(self) -> None:
        """Opens what was kept before a restart, if anything. Raises ConfigError."""
        path = self._model_path
        if path is None or not path.exists():
            return
        try:
            remembered = json.loads(path.read_text())
            facts, block_bytes = PairingFacts(**remembered["facts"]), int(remembered["block_bytes"])
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s cannot be read and is written anew with the first block: %s", path, error)
            return
        self._open(facts, block_bytes)

    def open(self, facts: PairingFacts, block_bytes: int) -> None:
        """Sees to it that blocks of this kind can be kept.

        Raises PreconditionError where those of another kind are, ConfigError where there is no room.
        """
        if self.tiers is None:
            self._open(facts, block_bytes)
            if (path := self._model_path) is not None:
                path.write_text(json.dumps({"facts": asdict(facts), "block_bytes": block_bytes}, indent=1))
        check_facts(self.facts, facts)
        if block_bytes != self.block_bytes:
            raise PreconditionError(
                f"this store keeps blocks of {self.block_bytes} bytes, not {block_bytes}", reason="PAIRING_MISMATCH"
            )

    def _open(self, facts: PairingFacts, block_bytes: int) -> None:
        self.tiers = self._config.open(facts, block_bytes)
        self.facts = facts
        for listener in self._listeners:
            self._stack.subscribe(listener)
        log.info("keeps KV blocks of %d bytes", block_bytes)
        self._on_open()

    @property
    def _model_path(self) -> Path | None:
        return Path(self._config.kv_disk_dir) / _MODEL_FILE if self._config.kv_disk_dir is not None else None

    @property
    def _stack(self) -> TierStack:
        assert self.tiers is not None, "open it first"
        return self.tiers

    # Fetching

    async def hold(self, hashes: Sequence[BlockHash]) -> "PinnedSlots":
        """The longest run that begins `hashes`, in host memory. Cancelling waits for the disk."""
        if self.tiers is None:
            return PinnedSlots(None, ())
        fetching = asyncio.get_running_loop().run_in_executor(None, self.tiers.fetch_into_host, hashes)
        try:
            await settled(fetching)
        except asyncio.CancelledError:
            self.tiers.host.unpin(fetching.result())
            raise
        return PinnedSlots(self.tiers, fetching.result())

    # Putting

    def lacking(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Places of the blocks that no tier holds, as far as there is room beside those of the run that are held.

        Those count as used now: without them, what is put behind them could not be found.
        """
        stack = self._stack
        stack.touch(hashes)
        lacking = [i for i, block_hash in enumerate(hashes) if not stack.locate([block_hash])]
        if stack.disk is not None:
            return lacking
        return lacking[: max(0, stack.host.num_blocks - (len(hashes) - len(lacking)))]

    def reserve(self, num_blocks: int) -> list[int]:
        """Slots to receive into; fewer where others are being written or read. Commit or release each."""
        return self._stack.host.reserve(num_blocks)

    def commit(self, slots: Sequence[int], hashes: Sequence[BlockHash]) -> None:
        """The slots hold these blocks of a run, all verified."""
        # As `unpin` does: the last block makes room before the first, without which it has no use.
        for slot, block_hash in reversed(list(zip(slots, hashes, strict=True))):
            self._stack.host.commit(slot, block_hash)

    def release(self, slots: Sequence[int]) -> None:
        self._stack.host.release(slots)

    # BlockMemory

    @property
    def block_bytes(self) -> int:
        return self._stack.host.block_bytes

    @property
    def file(self) -> MemoryFile | None:
        return self._stack.host.file

    def place(self, block_id: int) -> int:
        return self._stack.host.place(block_id)

    def view(self, block_id: int) -> memoryview:
        return self._stack.host.view(block_id)

    def to_host(self, block_ids: Sequence[int]) -> None:
        """Nothing to do: these are the host's bytes."""

    def to_device(self, block_ids: Sequence[int]) -> None:
        """Nothing to do: these are the host's bytes."""


class PinnedSlots:
    """Implements HeldBlocks."""

    def __init__(self, tiers: TierStack | None, slots: Sequence[int]) -> None:
        self._tiers = tiers
        self.block_ids = slots

    async def aclose(self) -> None:
        slots, self.block_ids = self.block_ids, ()
        if self._tiers is not None:
            self._tiers.host.unpin(slots)
