"""The receiving side, as a worker uses it: expect a transfer, wait for it, close it."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from types import TracebackType

from kvstore.transfer.base import BlockMemory, Grant, KVReceiver, SlicedMemory, TransferStats, TransportOffer
from kvstore.transfer.grpc_transport import SERVICE, GrpcReceiver
from kvstore.transfer.journal import TransferEntry, TransferJournal
from kvstore.transfer.nixl import NixlReceiver
from kvstore.transfer.shm import ShmReceiver, host_id
from kvstore.transfer.states import TransferState
from kvstore.transfer.tcp import TcpReceiver
from kvstore.transfer.tickets import Incoming, TicketTable
from kvstore.transfer.transports import HAS_NIXL
from pdmesh.errors import MeshError, PreconditionError, UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.server import GrpcServer
from pdmesh.tasks import settled
from pdmesh.transfers import Direction, Outcome
from pdmesh.types import BlockRun


class ReceiverHub:
    """All transports of one receiving worker, over one table of tickets.

    Args:
        memory: Where the blocks lie.
        transports: Names of the transports to receive on, best first; those that this machine has not are left out.
        server: The worker's gRPC server, not started; the grpc transport joins it.
        host: Where other transports listen.
        advertise: Host under which senders reach them.
        journal: Told of every transfer.
    """

    def __init__(
        self,
        memory: BlockMemory,
        transports: Sequence[str],
        server: GrpcServer,
        host: str,
        advertise: str,
        journal: TransferJournal,
    ) -> None:
        self._memory = memory
        self._journal = journal
        self._tickets = TicketTable(journal.note_fenced_write)
        self._receivers: dict[str, KVReceiver] = {}
        for name in transports:
            if name == "shm" and host_id():
                self._receivers[name] = ShmReceiver(self._tickets)
            elif name == "nixl" and HAS_NIXL:
                self._receivers[name] = NixlReceiver(memory, self._tickets, host, advertise)
            elif name == "tcp":
                self._receivers[name] = TcpReceiver(self._tickets, host, advertise)
            elif name == "grpc":
                receiver = GrpcReceiver(self._tickets, lambda: server.address)
                server.add(GrpcReceiver.add_to_server, receiver, SERVICE)
                self._receivers[name] = receiver

    @property
    def offers(self) -> list[TransportOffer]:
        """What senders may choose from, best first; once started."""
        return [TransportOffer(name, receiver.address) for name, receiver in self._receivers.items()]

    @property
    def num_open_tickets(self) -> int:
        return len(self._tickets)

    async def start(self) -> None:
        for receiver in self._receivers.values():
            await receiver.start()

    async def aclose(self) -> None:
        """Ends every transfer, and the transports."""
        self._tickets.revoke_all(
            UnavailableError("the receiving worker stops", reason="RECEIVER_LOST", stage="transfer")
        )
        for receiver in self._receivers.values():
            await receiver.aclose()

    def check_invariants(self) -> None:
        """Raises AssertionError where the books do not add up; callable at any time."""
        self._tickets.check_invariants()

    def expect(
        self,
        request_id: str,
        epoch: int,
        sender_id: str,
        sender_incarnation: str,
        block_ids: Sequence[int],
        block_hashes: Sequence[BlockHash],
        transport: str,
        run: BlockRun | None = None,
    ) -> "IncomingTransfer":
        """Issues a ticket for `block_ids`, all different, which are to hold the KV that `block_hashes` name.

        With `run`, only those bytes of each block are awaited.

        Raises PreconditionError for a transport not offered.
        """
        if transport not in self._receivers:
            raise PreconditionError(
                f"transport {transport!r} was not offered: {', '.join(self._receivers)}",
                reason="NO_COMMON_TRANSPORT",
                stage="transfer",
            )
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def on_end() -> None:
            # On any thread, and perhaps after the loop has gone.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set)

        memory = self._memory
        if run is not None and run.num_bytes != memory.block_bytes:
            memory = SlicedMemory(memory, run)
        block_bytes = memory.block_bytes
        entry = self._journal.begin(
            Direction.RECEIVING, request_id, sender_id, transport, len(block_ids), len(block_ids) * block_bytes
        )
        incoming = Incoming(
            request_id, epoch, sender_incarnation, block_ids, block_hashes, memory, entry.first_byte, on_end
        )
        grant = Grant(incoming.ticket, epoch, transport, self._receivers[transport].address)
        return IncomingTransfer(self._tickets, incoming, ended, grant, entry)


class IncomingTransfer:
    """One expected transfer. Close it in any case, and free its blocks only then."""

    def __init__(
        self, tickets: TicketTable, incoming: Incoming, ended: asyncio.Event, grant: Grant, entry: TransferEntry
    ) -> None:
        self.grant = grant
        self._entry = entry
        self._tickets = tickets
        self._incoming = incoming
        self._ended = ended
        self._started_at = time.monotonic()
        tickets.issue(incoming)

    async def wait(self) -> TransferStats:
        """Returns when every byte is here and verified. Raises what the transfer failed with."""
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._incoming.expires_at - time.monotonic())):
                    await self._ended.wait()
            self._incoming.tick()
        incoming = self._incoming
        stats = TransferStats(incoming.num_bytes, incoming.num_parts, time.monotonic() - self._started_at)
        if incoming.state is not TransferState.DONE:
            assert incoming.error is not None
            self._entry.fail(incoming.error, stats.num_bytes, stats.num_parts, stats.duration_s)
            raise incoming.error
        self._entry.end(Outcome.DONE, stats.num_bytes, stats.num_parts, stats.duration_s)
        return stats

    def alive(self) -> None:
        """The sender gave a sign of life."""
        self._incoming.alive()

    def fail(self, error: MeshError) -> None:
        """The sender says that nothing will come."""
        self._incoming.revoke(error)

    async def aclose(self) -> None:
        """Revokes the ticket; returns when no writer can reach the blocks any more. Idempotent."""
        self._tickets.drop(self._incoming)
        self._incoming.revoke()
        if not self._incoming.quiet:
            # A thread that the shutdown of its socket has not woken yet.
            self._entry.state = "stopping the writer"
            await settled(asyncio.get_running_loop().run_in_executor(None, self._incoming.wait_quiet))
        incoming = self._incoming
        self._entry.end(Outcome.ABORTED, incoming.num_bytes, incoming.num_parts, time.monotonic() - self._started_at)

    async def __aenter__(self) -> "IncomingTransfer":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
