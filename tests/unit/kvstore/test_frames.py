"""Frames: what is packed is parsed, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.transfer.frames import HEADER_BYTES, MAX_CONTROL_BYTES, Frame, FrameType, pack_nack, parse_nack
from pdmesh.errors import CorruptionError, InternalError, MeshError, OverloadedError, TicketError, UnavailableError

UINT32 = st.integers(0, 2**32 - 1)


@given(
    st.sampled_from(FrameType), UINT32, UINT32, st.integers(0, MAX_CONTROL_BYTES),
    st.binary(min_size=16, max_size=16),
)  # fmt: skip
def test_a_header_is_read_as_it_was_written(
    kind: FrameType, first: int, count: int, num_bytes: int, block_hash: bytes
) -> None:
    frame = Frame(kind, first, count, num_bytes, block_hash)
    assert len(frame.pack()) == HEADER_BYTES
    assert Frame.parse(frame.pack()) == frame


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_is_no_header(header: bytes) -> None:
    with pytest.raises(CorruptionError):
        Frame.parse(header)


@pytest.mark.parametrize("position", [0, 1, 2, 3, 4])
def test_another_protocol_or_version_is_refused(position: int) -> None:
    header = bytearray(Frame(FrameType.FINISH).pack())
    header[position] ^= 1
    with pytest.raises(CorruptionError, match="version"):
        Frame.parse(header)


def test_an_unknown_type_is_refused() -> None:
    header = bytearray(Frame(FrameType.FINISH).pack())
    header[5] = 77
    with pytest.raises(CorruptionError, match="77"):
        Frame.parse(header)


@pytest.mark.parametrize("kind", [FrameType.OPEN, FrameType.NACK])
def test_a_large_control_frame_is_refused_before_it_is_read(kind: FrameType) -> None:
    with pytest.raises(CorruptionError, match=str(MAX_CONTROL_BYTES + 1)):
        Frame.parse(Frame(kind, num_bytes=MAX_CONTROL_BYTES + 1).pack())


@pytest.mark.parametrize(
    "error",
    [
        TicketError("no such ticket", reason="TICKET_UNKNOWN"),
        CorruptionError("fails its checksum"),
        UnavailableError("two\nlines"),
        OverloadedError(""),
    ],
)
def test_a_refusal_is_read_as_it_was_written(error: MeshError) -> None:
    packed = pack_nack(error)
    assert Frame.parse(packed[:HEADER_BYTES]).num_bytes == len(packed) - HEADER_BYTES
    told = parse_nack(packed[HEADER_BYTES:])
    assert (type(told), told.reason, told.message) == (type(error), error.reason, error.message)


@given(st.binary(max_size=200))
def test_any_refusal_is_some_error(body: bytes) -> None:
    assert isinstance(parse_nack(body), MeshError)


def test_an_error_of_another_version_is_a_lost_peer() -> None:
    assert isinstance(parse_nack(pack_nack(InternalError("?"))[HEADER_BYTES:]), UnavailableError)


def test_a_long_message_is_cut() -> None:
    packed = pack_nack(CorruptionError("ä" * 10_000))
    assert len(packed) == HEADER_BYTES + MAX_CONTROL_BYTES
    assert parse_nack(packed[HEADER_BYTES:]).reason == "KV_CORRUPTED"
