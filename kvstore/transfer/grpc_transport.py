"""Transport `grpc`: parts in a `KVTransfer.Push` stream. Slower than a socket, and works wherever gRPC does.

A part carries at most 256 KiB: messages above glibc's mmap threshold cost a page fault per 4 KiB, which made 1 MiB
messages three times slower.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

import grpc

from kvstore.transfer.base import BlockMemory, Grant, TransferStats, crc32c
from kvstore.transfer.tickets import Incoming, TicketTable
from pdmesh import status
from pdmesh.errors import CorruptionError, MeshError, TicketError, UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.v1 import kv_transfer_pb2 as pb

MAX_PART_BYTES = 256 * 1024
SERVICE = pb.DESCRIPTOR.services_by_name["KVTransfer"].full_name
_PUSH = f"/{SERVICE}/Push"
_LENGTH_DELIMITED = 2
_PART_TAG = pb.PushRequest.PART_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_PAYLOAD_TAG = pb.KVPart.PAYLOAD_FIELD_NUMBER << 3 | _LENGTH_DELIMITED


_Context = grpc.aio.ServicerContext[pb.PushRequest, pb.PushResponse]


class Part(NamedTuple):
    """A `KVPart`: all of it but the payload, and the payload in the memory in which it arrived."""

    head: pb.KVPart
    payload: memoryview


class GrpcReceiver:
    """Takes parts: the KVTransfer service of a worker's gRPC server, which it shares an address with."""

    def __init__(self, tickets: TicketTable, server_address: Callable[[], str]) -> None:
        self._tickets = tickets
        self._server_address = server_address

    @property
    def address(self) -> str:
        return self._server_address()

    @staticmethod
    def add_to_server(receiver: "GrpcReceiver", server: grpc.aio.Server) -> None:
        """In place of the generated function, for a deserializer that leaves payloads where they are."""
        push = grpc.stream_unary_rpc_method_handler(
            receiver.push, request_deserializer=parse_push, response_serializer=pb.PushResponse.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Push": push}),))

    async def start(self) -> None:
        """Nothing to do: the server listens."""

    async def aclose(self) -> None:
        """Nothing to do: the server's stop ends the streams."""

    async def push(self, requests: "AsyncIterator[pb.PushRequest | Part]", context: _Context) -> pb.PushResponse:
        opening = await anext(aiter(requests), None)
        if opening is None or isinstance(opening, Part) or not opening.HasField("open"):
            raise TicketError("a push begins with its ticket", stage="transfer")
        incoming = self._tickets.redeem(
            opening.open.ticket, opening.open.epoch, opening.open.request_id, opening.open.sender_incarnation,
            "grpc", _stopper_of_current_task(),
        )  # fmt: skip
        try:
            # The ticket is taken; see GrpcSender.open.
            await context.send_initial_metadata(())
            async for request in requests:
                if isinstance(request, Part):
                    self._take(incoming, request)
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

    def _take(self, incoming: Incoming, part: "Part") -> None:
        head, payload = part
        # No await between the check of the ticket and the write: a revoked ticket's bytes never land.
        with incoming.writing(head.block_index, head.offset_bytes, len(payload), head.block_hash):
            if crc32c([payload]) != head.crc32c:
                raise CorruptionError(f"block {head.block_index} fails its checksum", stage="transfer")
            index, offset = head.block_index, head.offset_bytes
            while payload:
                rest = incoming.memory.view(incoming.block_ids[index])[offset:]
                num_bytes = min(len(rest), len(payload))
                rest[:num_bytes] = payload[:num_bytes]
                payload, index, offset = payload[num_bytes:], index + 1, 0


def _stopper_of_current_task() -> Callable[[], None]:
    task = asyncio.current_task()
    assert task is not None

    def stop() -> None:
        task.cancel()

    return stop


def parse_push(data: bytes) -> pb.PushRequest | Part:
    """A serialized `PushRequest`; protobuf's own way copies a part's payload, and once more whenever it is read.

    Raises DecodeError for what is none.
    """
    try:
        part = _part_in_place(data)
    except IndexError:
        part = None
    if part is not None:
        return part
    request = pb.PushRequest.FromString(data)
    return Part(request.part, memoryview(request.part.payload)) if request.HasField("part") else request


def _part_in_place(data: bytes) -> Part | None:
    """None, or IndexError, for what is no part or has not its payload at the end, where serializers write it."""
    if data[0] != _PART_TAG:
        return None
    num_bytes, begin = _varint(data, 1)
    if begin + num_bytes != len(data):
        return None
    at = begin
    while data[at] != _PAYLOAD_TAG:
        match data[at] & 7:
            case 0:  # varint; https://protobuf.dev/programming-guides/encoding/
                at = _varint(data, at + 1)[1]
            case 2:  # length-delimited
                length, begin_of_field = _varint(data, at + 1)
                at = begin_of_field + length
            case 5:  # fixed32
                at += 5
            case _:
                return None
    num_bytes, payload = _varint(data, at + 1)
    if payload + num_bytes != len(data):
        return None
    return Part(pb.KVPart.FromString(data[begin:at]), memoryview(data)[payload:])


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a byte, and where it ends."""
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def part_request(block_index: int, offset_bytes: int, block_hash: bytes, pieces: Sequence[memoryview]) -> bytes:
    """A `PushRequest` with a `KVPart`, as SerializeToString writes it, but with one copy of the payload, not four.

    The payload is `pieces`, end to end.
    """
    head = pb.KVPart(
        block_index=block_index, offset_bytes=offset_bytes, crc32c=crc32c(pieces), block_hash=block_hash
    ).SerializeToString()
    num_bytes = sum(map(len, pieces))
    head += _length_prefix(pb.KVPart.PAYLOAD_FIELD_NUMBER, num_bytes)
    return b"".join((_length_prefix(pb.PushRequest.PART_FIELD_NUMBER, len(head) + num_bytes), head, *pieces))


def _length_prefix(field_number: int, num_bytes: int) -> bytes:
    """What stands before a field of type bytes or message: its tag and length."""
    prefix = bytearray([field_number << 3 | _LENGTH_DELIMITED])
    while num_bytes >= 0x80:
        prefix.append(num_bytes & 0x7F | 0x80)
        num_bytes >>= 7
    prefix.append(num_bytes)
    return bytes(prefix)


class GrpcSender:
    """See base.KVSender. Takes the channel's use, not its ownership."""

    def __init__(
        self, memory: BlockMemory, grant: Grant, request_id: str, incarnation: str, channel: grpc.aio.Channel
    ) -> None:
        self._memory = memory
        self._open = pb.PushOpen(
            ticket=grant.ticket, epoch=grant.epoch, request_id=request_id, sender_incarnation=incarnation
        )
        self._call: grpc.aio.StreamUnaryCall[bytes, pb.PushResponse] = channel.stream_unary(
            _PUSH, response_deserializer=pb.PushResponse.FromString
        )()
        self._num_parts = 0
        self._num_bytes = 0
        self._opened_at = 0.0

    async def open(self) -> None:
        self._opened_at = time.monotonic()
        await self._write(pb.PushRequest(open=self._open).SerializeToString())
        # Until the ticket is taken, the receiver does not learn that this call was lost: its handler may never run.
        await self._call.initial_metadata()
        if self._call.done():
            await self._answer()

    async def send(self, first_index: int, block_ids: Sequence[int], block_hashes: Sequence[BlockHash]) -> None:
        block_bytes = self._memory.block_bytes
        end = len(block_ids) * block_bytes
        for begin in range(0, end, MAX_PART_BYTES):
            # A part goes on over the blocks that follow: fewer messages.
            pieces, at = [], begin
            while at < min(begin + MAX_PART_BYTES, end):
                index, offset = divmod(at, block_bytes)
                pieces.append(self._memory.view(block_ids[index])[offset:][: begin + MAX_PART_BYTES - at])
                at += len(pieces[-1])
            index, offset = divmod(begin, block_bytes)
            last_hash = block_hashes[(at - 1) // block_bytes]
            await self._write(part_request(first_index + index, offset, last_hash, pieces))
            self._num_parts += 1
            self._num_bytes += at - begin

    async def finish(self) -> TransferStats:
        finish = pb.PushFinish(num_parts=self._num_parts, num_bytes=self._num_bytes)
        await self._write(pb.PushRequest(finish=finish).SerializeToString())
        # The receiver ends the call; closing our side of it first would be one more thing that can fail.
        await self._answer()
        return TransferStats(self._num_bytes, self._num_parts, time.monotonic() - self._opened_at)

    async def aclose(self) -> None:
        self._call.cancel()

    async def _write(self, request: bytes) -> None:
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
