"""Messages between the ranks of a group: what was sent, or GroupDownError, whatever the other end does."""

import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Batch
from engine.parallel.exchange import GroupDownError
from engine.parallel.wire import Loaded, Message, Serve, Serving, Wire, pack_batch, unpack_batch

MESSAGES: list[Message] = [
    Loaded(max_blocks=7, max_model_len=112, digest="ab" * 32, weight_bytes=1 << 40, on_kernels=True),
    Serve(num_blocks=5, max_model_len=80),
    Serving(host="10.0.0.1", pid=4711, kv_bytes=1 << 33),
]
_BATCH = 0


@pytest.fixture
def ends() -> Iterator[tuple[Wire, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Wire(ours, "rank 1"), theirs


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    num_sequences, num_blocks = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    query_lens = [draw(st.integers(1, 9)) for _ in range(num_sequences)]
    num_tokens = sum(query_lens)
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randint(2**62, shape, generator=numbers)

    calls = draw(st.lists(st.integers(0, 8), max_size=5))
    # A table may be a part of a wider one.
    table = tensor(num_sequences, num_blocks + 2)[:, :num_blocks]
    return Batch(
        input_ids=tensor(num_tokens),
        positions=tensor(num_tokens),
        slot_mapping=tensor(num_tokens),
        query_lens=ints(*query_lens),
        seq_lens=tensor(num_sequences).numpy(),
        block_tables=table,
        output_lens=tensor(num_sequences).numpy(),
        logit_rows=tuple(tensor(num_rows).numpy() for num_rows in calls),
    )


def assert_equal(actual: Batch, expected: Batch) -> None:
    for name in ("input_ids", "positions", "slot_mapping", "block_tables"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for name in ("query_lens", "seq_lens", "output_lens"):
        assert np.array_equal(getattr(actual, name), getattr(expected, name)), name
    assert [rows.tolist() for rows in actual.logit_rows] == [rows.tolist() for rows in expected.logit_rows]


@given(batches())
def test_a_batch_comes_as_it_was_sent(batch: Batch) -> None:
    assert_equal(unpack_batch(bytearray(b"".join(pack_batch(batch)))), batch)


@given(batches(), st.data())
def test_a_batch_that_is_cut_or_longer_is_none(batch: Batch, data: st.DataObject) -> None:
    packed = b"".join(pack_batch(batch))
    cut = data.draw(st.integers(0, len(packed) - 1))
    for broken in (packed[:cut], packed + b"\0" * 8):
        with pytest.raises(ValueError, match="are not the batch that they begin as"):
            unpack_batch(bytearray(broken))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_as_it_was_sent(ends: tuple[Wire, socket.socket], message: Message) -> None:
    wire, theirs = ends
    Wire(theirs, "rank 0").send(message)
    assert wire.receive() == message


def test_messages_in_pieces(ends: tuple[Wire, socket.socket]) -> None:
    wire, theirs = ends
    ours, other = socket.socketpair()
    with ours, other:
        for message in MESSAGES:
            Wire(ours, "").send(message)
        data = other.recv(1 << 16)

    def dribble() -> None:
        for byte in data:
            theirs.sendall(bytes([byte]))

    thread = threading.Thread(target=dribble)
    thread.start()
    assert [wire.receive() for _ in MESSAGES] == MESSAGES
    thread.join()


def test_the_other_end_closes_between_messages(ends: tuple[Wire, socket.socket]) -> None:
    wire, theirs = ends
    theirs.close()
    assert wire.receive() is None


@pytest.mark.parametrize("kept", [1, 11, 12, 20])
def test_the_other_end_closes_within_a_message(ends: tuple[Wire, socket.socket], kept: int) -> None:
    wire, theirs = ends
    theirs.sendall((struct.pack("<IQ", 2, 50) + b" " * 50)[:kept])
    theirs.close()
    with pytest.raises(GroupDownError, match="rank 1 closed the connection"):
        wire.receive()


def test_nobody_reads_what_is_sent(ends: tuple[Wire, socket.socket]) -> None:
    wire, theirs = ends
    theirs.close()
    with pytest.raises(GroupDownError, match="rank 1 is gone"):
        wire.send(Serve(1, 1))


@pytest.mark.parametrize(("kind", "num_bytes"), [(9, 10), (2**32 - 1, 0), (1, 2**28 + 1), (_BATCH, 2**63)], ids=str)
def test_no_memory_is_taken_for_what_is_no_message(ends: tuple[Wire, socket.socket], kind: int, num_bytes: int) -> None:
    wire, theirs = ends
    theirs.sendall(struct.pack("<IQ", kind, num_bytes))
    with pytest.raises(GroupDownError, match=f"rank 1 sent what is no message: kind {kind}, {num_bytes} bytes"):
        wire.receive()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (1, b"{"),
        (2, b"\xff\xff"),
        (2, b"[1, 2]"),
        (2, b'{"num_blocks": 1}'),
        (3, b'{"host": "h", "pid": 1, "kv_bytes": 1, "more": 1}'),
        (_BATCH, b""),
        (_BATCH, struct.pack("<4Q", 1, 1, 1, 0)),
        (_BATCH, struct.pack("<4Q", 2**61, 2**61, 2**61, 2**61) + b"\0" * 64),
        (_BATCH, struct.pack("<4Q", 0, 0, 0, 1) + struct.pack("<2q", -5, 0)),
        (_BATCH, struct.pack("<4Q", 0, 0, 0, 0) + b"\0" * 3),
    ],
)
def test_a_broken_message(ends: tuple[Wire, socket.socket], kind: int, body: bytes) -> None:
    wire, theirs = ends
    theirs.sendall(struct.pack("<IQ", kind, len(body)) + body)
    with pytest.raises(GroupDownError, match=f"rank 1 sent a broken message of kind {kind}"):
        wire.receive()
