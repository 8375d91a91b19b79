"""The sending side, as a worker uses it: which transports reach a receiver, and the right sender for a grant."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from kvstore.transfer.base import BlockMemory, Grant, KVSender, TransportOffer
from kvstore.transfer.grpc_transport import GrpcSender
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.nixl import NixlLink
from kvstore.transfer.shm import ShmLink, why_unreachable
from kvstore.transfer.socket_sender import ConnectionPool, Link, SocketSender
from kvstore.transfer.tcp import TcpLink
from kvstore.transfer.transports import TRANSPORTS
from pdmesh.errors import MeshError, PreconditionError

# In which a receiver must answer, or its transport counts as one that does not reach it, for a while.
NEGOTIATION_TIMEOUT_S = 1.0
UNREACHABLE_S = 10.0


@dataclass(frozen=True, slots=True)
class Negotiation:
    """What became of a receiver's offers: those that reach it, best first, and why the others do not, by name."""

    usable: tuple[str, ...]
    unusable: Mapping[str, str] = field(default_factory=dict)


class KVSenders:
    """Makes the senders of one worker; owns its pooled connections, not its channels.

    Args:
        memory: Where the blocks lie.
        incarnation: This process's; tickets are bound to it.
        channel_for: The gRPC channel to an address.
        journal: Told of every transfer.
        transports: Names of those to use.
    """

    def __init__(
        self,
        memory: BlockMemory,
        incarnation: str,
        channel_for: Callable[[str], grpc.aio.Channel],
        journal: TransferJournal,
        transports: Sequence[str] = TRANSPORTS,
    ) -> None:
        self._memory = memory
        self._incarnation = incarnation
        self._channel_for = channel_for
        self.journal = journal
        self._transports = transports
        self._pools: dict[str, ConnectionPool] = {}
        # Offers that failed: until when that is believed, and why.
        self._unreachable: dict[TransportOffer, tuple[float, str]] = {}

    async def negotiate(self, offers: Sequence[TransportOffer], receiver_id: str) -> Negotiation:
        """Finds out which of the offers of the worker `receiver_id`, best first, can be used.

        Connects, so that a transfer finds an open connection: do it while the prompt is being computed. Only the best
        one that answers is connected to; those after it are taken at their word.

        Raises PreconditionError where there is none.
        """
        usable: list[str] = []
        unusable: dict[str, str] = {}
        for offer in offers:
            reason = self._why_not(offer)
            if not reason and not usable:
                reason = await self._connect(offer)
            if reason:
                unusable[offer.name] = reason
            else:
                usable.append(offer.name)
        if not usable:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in unusable.items()) or "none is offered"
            raise PreconditionError(
                f"no KV transport reaches the receiver: {reasons}", reason="NO_COMMON_TRANSPORT", stage="transfer"
            )
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unusable.items())
        self.journal.note_choice(receiver_id, usable[0], reasons or "the best on offer")
        return Negotiation(tuple(usable), unusable)

    def sender(self, grant: Grant, request_id: str, memory: BlockMemory | None = None) -> KVSender:
        """A sender for one grant, of whole blocks, or of a slice of them: `memory`.

        Raises PreconditionError for a transport that is not ours.
        """
        if reason := self._why_not(TransportOffer(grant.transport, grant.address)):
            raise PreconditionError(
                f"transport {grant.transport!r} cannot be used: {reason}",
                reason="NO_COMMON_TRANSPORT",
                stage="transfer",
            )
        pool = self._pool(grant.transport)
        if pool is not None:
            return SocketSender(memory or self._memory, grant, request_id, self._incarnation, pool)
        return GrpcSender(
            memory or self._memory, grant, request_id, self._incarnation, self._channel_for(grant.address)
        )

    async def aclose(self) -> None:
        """Closes pooled connections and ends the threads; every sender is to be closed before."""
        for pool in self._pools.values():
            await pool.aclose()

    async def _connect(self, offer: TransportOffer) -> str:
        """Opens a connection if there is none. Returns why that failed, now or a moment ago; else an empty string."""
        pool = self._pool(offer.name)
        if pool is None:
            return ""
        until, reason = self._unreachable.get(offer, (0.0, ""))
        if time.monotonic() < until:
            return reason
        try:
            async with asyncio.timeout(NEGOTIATION_TIMEOUT_S):
                await pool.warm(offer.address)
            self._unreachable.pop(offer, None)
            return ""
        except MeshError as error:
            reason = error.message
        except TimeoutError:
            reason = f"{offer.address} does not answer"
        now = time.monotonic()
        self._unreachable = {other: said for other, said in self._unreachable.items() if said[0] > now}
        self._unreachable[offer] = (now + UNREACHABLE_S, reason)
        return reason

    def _why_not(self, offer: TransportOffer) -> str:
        """Why a transport is not to be tried; empty if it is."""
        if offer.name not in self._transports:
            return "this installation does not have it" if offer.name not in TRANSPORTS else "it is switched off here"
        if offer.name == "shm" and (reason := why_unreachable(offer.address)):
            return reason
        return "the KV lies in private memory here" if offer.name in ("shm", "nixl") and not self._memory.file else ""

    def _pool(self, transport: str) -> ConnectionPool | None:
        """The connections of a transport that has its own; made at first use, when the engine's memory is there."""
        if transport == "grpc":
            return None
        if transport not in self._pools:
            self._pools[transport] = ConnectionPool(self._link(transport))
        return self._pools[transport]

    def _link(self, transport: str) -> Link:
        file = self._memory.file
        if transport == "tcp" or file is None:
            return TcpLink()
        return ShmLink(file) if transport == "shm" else NixlLink(self._memory, file)
