"""One request's KV on its way in: a grant for one transport after the other, until one of them has brought all of it.

The other end is a `Shipment`. What both say to each other beside the KV goes over a stream that the caller owns: grants
that way; this way, signs of life and which grants came to nothing.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from kvstore.transfer.base import Grant, TransferStats
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.receiver import IncomingTransfer, ReceiverHub
from pdmesh.errors import MeshError, UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.types import BlockRun

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Expected:
    """What is to come: the KV that `block_hashes` name, into `block_ids`, from one process for one attempt.

    `run` says which bytes of each block; None: all.
    """

    request_id: str
    epoch: int
    sender_id: str
    sender_incarnation: str
    block_ids: Sequence[int]
    block_hashes: Sequence[BlockHash]
    run: BlockRun | None = None


class Receipt:
    """Used once; everything is called on one event loop.

    Args:
        hub: Receives.
        journal: Told of transports that gave way to the next.
    """

    def __init__(self, hub: ReceiverHub, journal: TransferJournal) -> None:
        self._hub = hub
        self._journal = journal
        self._number = -1
        self._incoming: IncomingTransfer | None = None

    async def run(
        self, expected: Expected, transports: Sequence[str], grant: Callable[[int, Grant], Awaitable[None]]
    ) -> TransferStats:
        """Returns when every byte is here and verified; no writer can reach the blocks any more, however it ends.

        Args:
            transports: That the sender can use, best first.
            grant: Sends the sender a numbered grant.

        Raises MeshError: what the last transport failed with.
        """
        for number, transport in enumerate(transports):
            async with self._hub.expect(
                expected.request_id,
                expected.epoch,
                expected.sender_id,
                expected.sender_incarnation,
                expected.block_ids,
                expected.block_hashes,
                transport,
                expected.run,
            ) as incoming:
                self._number, self._incoming = number, incoming
                await grant(number, incoming.grant)
                try:
                    return await incoming.wait()
                except MeshError as error:
                    # Whoever hangs will not do better over another transport.
                    if error.reason == "LEASE_EXPIRED" or number + 1 == len(transports):
                        raise
                    self._journal.note_fallback(transport, transports[number + 1], error.reason)
                    log.warning(
                        "KV over %s failed, taking %s: %s", transport, transports[number + 1], error.message,
                        extra={"request_id": expected.request_id, "reason": error.reason},
                    )  # fmt: skip
        raise UnavailableError(
            f"{expected.sender_id} can use no transport", reason="NO_COMMON_TRANSPORT", stage="transfer"
        )

    def alive(self) -> None:
        """The sender gave a sign of life."""
        if self._incoming is not None:
            self._incoming.alive()

    def failed(self, number: int, reason: str, message: str) -> None:
        """The sender says that a grant came to nothing."""
        if self._incoming is not None and number == self._number:
            self._incoming.fail(UnavailableError(message, reason=reason, stage="transfer"))
