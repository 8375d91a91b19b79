"""The receiving side, as a decode worker uses it: expect a transfer, wait for it, close it."""

import asyncio
import contextlib
from collections.abc import Sequence
from types import TracebackType

from kvstore.transfer.base import BlockMemory, Grant, KVReceiver, TransferStats
from kvstore.transfer.grpc_transport import SERVICE, GrpcReceiver
from kvstore.transfer.tcp import TcpReceiver
from kvstore.transfer.tickets import Incoming, TicketTable, TransferState
from pdmesh.errors import PreconditionError, UnavailableError
from pdmesh.server import GrpcServer
from pdmesh.tasks import settled


class ReceiverHub:
    """All transports of one receiving worker, over one table of tickets.

    Args:
        memory: Where the blocks lie.
        transports: Names of the transports to receive on, best first.
        server: The worker's gRPC server, not started; the grpc transport joins it.
        host: Where other transports listen.
        advertise: Host under which senders reach them.
    """

    def __init__(
        self, memory: BlockMemory, transports: Sequence[str], server: GrpcServer, host: str, advertise: str
    ) -> None:
        self.transports = tuple(transports)
        self._memory = memory
        self._tickets = TicketTable()
        self._receivers: dict[str, KVReceiver] = {}
        if "tcp" in self.transports:
            self._receivers["tcp"] = TcpReceiver(memory, self._tickets, host, advertise)
        if "grpc" in self.transports:
            receiver = GrpcReceiver(memory, self._tickets, lambda: server.address)
            server.add(GrpcReceiver.add_to_server, receiver, SERVICE)
            self._receivers["grpc"] = receiver

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

    def expect(
        self, request_id: str, epoch: int, sender_incarnation: str, block_ids: Sequence[int], transport: str
    ) -> "IncomingTransfer":
        """Issues a ticket for `block_ids`, all different. Raises PreconditionError for a transport not offered."""
        if transport not in self._receivers:
            raise PreconditionError(
                f"transport {transport!r} was not offered: {', '.join(self.transports)}",
                reason="NO_COMMON_TRANSPORT",
                stage="transfer",
            )
        address = self._receivers[transport].address
        return IncomingTransfer(
            self._tickets,
            request_id,
            epoch,
            sender_incarnation,
            block_ids,
            self._memory.block_bytes,
            transport,
            address,
        )


class IncomingTransfer:
    """One expected transfer. Close it in any case, and free its blocks only then."""

    def __init__(
        self,
        tickets: TicketTable,
        request_id: str,
        epoch: int,
        sender_incarnation: str,
        block_ids: Sequence[int],
        block_bytes: int,
        transport: str,
        address: str,
    ) -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        self._ended = ended
        self._started_at = loop.time()
        self._tickets = tickets

        def on_end() -> None:
            # On any thread, and perhaps after the loop has gone.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set)

        self._incoming = Incoming(request_id, epoch, sender_incarnation, block_ids, block_bytes, on_end)
        tickets.issue(self._incoming)
        self.grant = Grant(self._incoming.ticket, epoch, transport, address)

    async def wait(self) -> TransferStats:
        """Returns when every byte is here and verified. Raises what the transfer failed with."""
        await self._ended.wait()
        incoming = self._incoming
        if incoming.state is not TransferState.DONE:
            assert incoming.error is not None
            raise incoming.error
        duration_s = asyncio.get_running_loop().time() - self._started_at
        return TransferStats(incoming.num_bytes, incoming.num_parts, duration_s)

    async def aclose(self) -> None:
        """Revokes the ticket; returns when no writer can reach the blocks any more. Idempotent."""
        self._tickets.drop(self._incoming)
        self._incoming.revoke()
        if not self._incoming.quiet:
            # A thread that the shutdown of its socket has not woken yet.
            await settled(asyncio.get_running_loop().run_in_executor(None, self._incoming.wait_quiet))

    async def __aenter__(self) -> "IncomingTransfer":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
