"""Parts of the gRPC transport: written and read without protobuf's copies, to the same bytes and the same messages."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore.transfer.base import crc32c
from kvstore.transfer.grpc_transport import Part, parse_push, part_request
from pdmesh.v1 import kv_transfer_pb2 as pb

HASH = bytes(range(16))
payloads = st.binary(max_size=300)


def halves(payload: bytes) -> list[memoryview]:
    """As where a part goes on over the end of a block."""
    middle = len(payload) // 2
    return [memoryview(payload)[:middle], memoryview(payload)[middle:]]


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), payloads)
@example(0, 0, b"")
@example(3, 262144, bytes(262144))
def test_a_part_is_written_as_protobuf_writes_it(block_index: int, offset_bytes: int, payload: bytes) -> None:
    crc = crc32c([payload])
    part = pb.KVPart(block_index=block_index, offset_bytes=offset_bytes, crc32c=crc, block_hash=HASH, payload=payload)
    message = pb.PushRequest.FromString(part_request(block_index, offset_bytes, HASH, halves(payload)))
    assert message == pb.PushRequest(part=part)
    if payload:
        expected = pb.PushRequest(part=part).SerializeToString()
        assert part_request(block_index, offset_bytes, HASH, halves(payload)) == expected


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), payloads)
def test_a_part_is_read_as_protobuf_reads_it(index: int, offset: int, crc: int, payload: bytes) -> None:
    part = pb.KVPart(block_index=index, offset_bytes=offset, crc32c=crc, block_hash=HASH, payload=payload)
    read = parse_push(pb.PushRequest(part=part).SerializeToString())
    assert isinstance(read, Part)
    head = read.head
    assert (head.block_index, head.offset_bytes, head.crc32c, head.block_hash) == (index, offset, crc, HASH)
    assert read.payload == payload


def test_fields_in_another_order_are_read_too() -> None:
    payload = pb.KVPart(payload=b"abc").SerializeToString()
    index = pb.KVPart(block_index=7).SerializeToString()
    body = payload + index
    read = parse_push(bytes([0x12, len(body)]) + body)
    assert isinstance(read, Part)
    assert (read.head.block_index, bytes(read.payload)) == (7, b"abc")


def test_other_messages_stay_messages() -> None:
    opening = pb.PushRequest(open=pb.PushOpen(ticket=b"t" * 16, epoch=3))
    assert parse_push(opening.SerializeToString()) == opening
    assert parse_push(b"") == pb.PushRequest()


@given(st.binary(max_size=60))
@example(b"\x12")
@example(b"\x12\x05\x2a\xff\xff\xff\xff")
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        expected = pb.PushRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            parse_push(data)
        return
    read = parse_push(data)
    if isinstance(read, Part):
        assert bytes(read.payload) == expected.part.payload
        assert read.head.block_index == expected.part.block_index
    else:
        assert read == expected
