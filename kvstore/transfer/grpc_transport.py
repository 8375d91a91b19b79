"""Transport `grpc`: parts in a `KVTransfer.Push` stream. Slower than a socket, and works wherever gRPC does.

A part carries at most 256 KiB: messages above glibc's mmap threshold cost a page fault per 4 KiB, which made 1 MiB
messages three times slower.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from kvstore.transfer.base import BlockMemory, Grant, TransferStats, crc32c
from kvstore.transfer.tickets import Incoming, TicketTable
from pdmesh import status
from pdmesh.errors import CorruptionError, MeshError, TicketError, UnavailableError
from pdmesh.v1 import kv_transfer_pb2 as pb
from pdmesh.v1 import kv_transfer_pb2_grpc

MAX_PART_BYTES = 256 * 1024


class GrpcReceiver(kv_transfer_pb2_grpc.KVTransferServicer):
    """Takes parts into `memory`. Part of a worker's gRPC server, which it shares an address with."""

    def __init__(self, memory: BlockMemory, tickets: TicketTable, server_address: Callable[[], str]) -> None:
        self._memory = memory
        self._tickets = tickets
        self._server_address = server_address

    @property
    def address(self) -> str:
        return self._server_address()

    async def start(self) -> None:
        """Nothing to do: the server listens."""

    async def aclose(self) -> None:
        """Nothing to do: the server's stop ends the streams."""

    async def Push(self, request_iterator: AsyncIterator[pb.PushRequest], context: object) -> pb.PushResponse:
        requests = aiter(request_iterator)
        opening = await anext(requests, None)
        if opening is None or not opening.HasField("open"):
            raise TicketError("a push begins with its ticket", stage="transfer")
        incoming = self._tickets.redeem(
            opening.open.ticket, opening.open.epoch, opening.open.request_id, opening.open.sender_incarnation,
            _stopper_of_current_task(),
        )  # fmt: skip
        try:
            async for request in requests:
                if request.HasField("part"):
                    self._take(incoming, request.part)
                else:
                    incoming.finish(request.finish.num_parts, request.finish.num_bytes)
                    return pb.PushResponse(num_parts=incoming.num_parts, num_bytes=incoming.num_bytes)
            raise UnavailableError("the sender stopped before its last part", reason="SENDER_LOST", stage="transfer")
        except MeshError as error:
            incoming.fail(error)
            raise
        except asyncio.CancelledError:
            # Revoked here, in which case the sender is told; or it has left.
            if incoming.error is not None:
                raise incoming.error from None
            raise
        finally:
            incoming.fail(UnavailableError("the sender was lost", reason="SENDER_LOST", stage="transfer"))

    def _take(self, incoming: Incoming, part: pb.KVPart) -> None:
        # No await between the check of the ticket and the write: a revoked ticket's bytes never land.
        with incoming.writing(part.block_index, part.offset_bytes, len(part.payload)):
            if crc32c([part.payload]) != part.crc32c:
                raise CorruptionError(f"block {part.block_index} fails its checksum", stage="transfer")
            block = self._memory.view(incoming.block_ids[part.block_index])
            block[part.offset_bytes : part.offset_bytes + len(part.payload)] = part.payload
        incoming.count_part()


def _stopper_of_current_task() -> Callable[[], None]:
    task = asyncio.current_task()
    assert task is not None

    def stop() -> None:
        task.cancel()

    return stop


class GrpcSender:
    """See base.KVSender. Takes the channel's use, not its ownership."""

    def __init__(
        self, memory: BlockMemory, grant: Grant, request_id: str, incarnation: str, channel: grpc.aio.Channel
    ) -> None:
        self._memory = memory
        self._open = pb.PushOpen(
            ticket=grant.ticket, epoch=grant.epoch, request_id=request_id, sender_incarnation=incarnation
        )
        self._call = kv_transfer_pb2_grpc.KVTransferStub(channel).Push()
        self._num_parts = 0
        self._num_bytes = 0
        self._opened_at = 0.0

    async def open(self) -> None:
        self._opened_at = time.monotonic()
        await self._write(pb.PushRequest(open=self._open))

    async def send(self, first_index: int, block_ids: Sequence[int]) -> None:
        for index, block_id in enumerate(block_ids, first_index):
            block = self._memory.view(block_id)
            for offset in range(0, len(block), MAX_PART_BYTES):
                piece = bytes(block[offset : offset + MAX_PART_BYTES])
                part = pb.KVPart(block_index=index, offset_bytes=offset, crc32c=crc32c([piece]), payload=piece)
                await self._write(pb.PushRequest(part=part))
                self._num_parts += 1
                self._num_bytes += len(piece)

    async def finish(self) -> TransferStats:
        await self._write(pb.PushRequest(finish=pb.PushFinish(num_parts=self._num_parts, num_bytes=self._num_bytes)))
        # The receiver ends the call; closing our side of it first would be one more thing that can fail.
        await self._answer()
        return TransferStats(self._num_bytes, self._num_parts, time.monotonic() - self._opened_at)

    async def aclose(self) -> None:
        self._call.cancel()

    async def _write(self, request: pb.PushRequest) -> None:
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            # The receiver has ended the call: its status says why, the failed write does not.
            await self._answer()
            raise UnavailableError(
                "the receiver ended the transfer early", reason="RECEIVER_LOST", stage="transfer"
            ) from error

    async def _answer(self) -> None:
        """Waits for the receiver's answer; raises what it refused with."""
        try:
            await self._call
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INTERNAL and not error.trailing_metadata():
                # grpc.aio's own: a write that was under way when the status came hides it.
                raise UnavailableError(
                    "the receiver ended the transfer early; its log says why", reason="RECEIVER_LOST", stage="transfer"
                ) from error
            raise status.from_rpc_error(error, stage="transfer") from error
