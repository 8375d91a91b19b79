"""What the leader of a group and a follower say to each other, over one stream socket between them.

    follower ─ Loaded ─▶ leader      its shard is in memory: how many KV blocks it has room for
    leader ─ Serve ─▶ follower       how many there are
    follower ─ Serving ─▶ leader     its cache is mapped, its executor made
    leader ─ Begin ─▶ follower       so it is with all
    leader ─ Batch ─▶ follower       for each step; nothing comes back
    leader ─ Stage ─▶ follower       between steps, on devices: KV is to be copied; Staged comes back

A message is its kind, its length, and JSON; of a batch, its numbers as they lie in memory.
"""

import json
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch

from engine.batch import Batch
from engine.parallel.exchange import GroupDownError

# Far beyond a step of any model: what a broken peer may claim.
_MAX_BYTES: Final = 1 << 28
_BATCH: Final = 0
_HEADER: Final = struct.Struct("<IQ")
# Tokens, sequences, blocks of the longest, calls for logits.
_SHAPE: Final = struct.Struct("<4Q")
_NUMBER_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Loaded:
    """A follower's shard is in memory.

    Attributes:
        max_blocks: KV blocks that it has room for.
        max_model_len: Tokens of a request that these allow, and its model.
        digest: Of its model.
        weight_bytes: Of its shard.
        on_kernels: It has our CPU kernels to compute with.
    """

    max_blocks: int
    max_model_len: int
    digest: str
    weight_bytes: int
    on_kernels: bool


@dataclass(frozen=True, slots=True)
class Serve:
    """The least of what the ranks have room for."""

    num_blocks: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Serving:
    """A follower waits for steps.

    Attributes:
        kv_bytes: Of its part of the KV cache.
        kv_address: Where its node's KV memory is moved, if it does that for its node; else empty.
        kv_runs: Which bytes of a block that memory holds: pairs of offset and number.
        kv_offers: Names and addresses of the transports on which it receives.
    """

    host: str
    pid: int
    kv_bytes: int
    kv_address: str = ""
    kv_runs: tuple[tuple[int, int], ...] = ()
    kv_offers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Begin:
    """All ranks wait for steps."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The follower's region of these blocks is to be copied from its device to host memory, or back."""

    block_ids: tuple[int, ...]
    to_host: bool


@dataclass(frozen=True, slots=True)
class Staged:
    """So it was."""


_MESSAGES: Final[dict[int, type[Any]]] = {1: Loaded, 2: Serve, 3: Serving, 4: Begin, 5: Stage, 6: Staged}
_KINDS: Final = {message: kind for kind, message in _MESSAGES.items()}

Message = Loaded | Serve | Serving | Begin | Stage | Staged


class Wire:
    """One end; owns the socket. Blocking; raises GroupDownError where the other end is gone. Any thread may send.

    Attributes:
        peer: Who is at the other end, for messages.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self.peer = peer

    def send(self, message: Message) -> None:
        self._send(_KINDS[type(message)], [json.dumps(asdict(message)).encode()])

    def send_batch(self, packed: Sequence[bytes | memoryview]) -> None:
        """Sends what `pack_batch` made."""
        self._send(_BATCH, packed)

    def receive(self) -> Message | Batch | None:
        """The next message; None where the other end has closed instead."""
        header = self._receive(_HEADER.size, eof_ok=True)
        if header is None:
            return None
        kind, num_bytes = _HEADER.unpack(header)
        if num_bytes > _MAX_BYTES or (kind != _BATCH and kind not in _MESSAGES):
            raise GroupDownError(f"{self.peer} sent what is no message: kind {kind}, {num_bytes} bytes")
        body = self._receive(num_bytes)
        assert body is not None
        try:
            if kind == _BATCH:
                return unpack_batch(body)
            message: Message = _MESSAGES[kind](
                **{name: _with_tuples(value) for name, value in json.loads(body).items()}
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise GroupDownError(f"{self.peer} sent a broken message of kind {kind}: {error}") from error
        return message

    def close(self) -> None:
        self._sock.close()

    def _send(self, kind: int, pieces: Sequence[bytes | memoryview]) -> None:
        num_bytes = sum(map(len, pieces))
        message = b"".join((_HEADER.pack(kind, num_bytes), *pieces))
        try:
            with self._sending:
                self._sock.sendall(message)
        except OSError as error:
            raise GroupDownError(f"{self.peer} is gone: {error}") from error

    def _receive(self, num_bytes: int, *, eof_ok: bool = False) -> bytearray | None:
        data = bytearray(num_bytes)
        left = memoryview(data)
        while left:
            try:
                received = self._sock.recv_into(left)
            except OSError as error:
                raise GroupDownError(f"{self.peer} is gone: {error}") from error
            if not received:
                if eof_ok and len(left) == num_bytes:
                    return None
                raise GroupDownError(f"{self.peer} closed the connection")
            left = left[received:]
        return data


def _with_tuples(value: Any) -> Any:
    """JSON knows lists alone."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def pack_batch(batch: Batch) -> list[bytes | memoryview]:
    """A batch on the host, for `Wire.send_batch`."""
    table = batch.block_tables.numpy()
    shape = (len(batch.input_ids), *table.shape, len(batch.logit_rows))
    arrays = (
        batch.input_ids.numpy(),
        batch.positions.numpy(),
        batch.slot_mapping.numpy(),
        batch.query_lens,
        batch.seq_lens,
        batch.output_lens,
        table,
        np.array([len(rows) for rows in batch.logit_rows], np.int64),
        *batch.logit_rows,
    )
    return [
        _SHAPE.pack(*shape),
        *(np.ascontiguousarray(array, np.int64).data.cast("B") for array in arrays if array.size),
    ]


def unpack_batch(data: bytearray) -> Batch:
    """What `pack_batch` packed; its tensors lie in `data`. Raises ValueError for what it did not pack."""
    broken = ValueError(f"{len(data)} bytes are not the batch that they begin as")
    if len(data) < _SHAPE.size or len(data) % _NUMBER_BYTES:
        raise broken
    num_tokens, num_sequences, num_blocks, num_calls = _SHAPE.unpack_from(data)
    numbers = np.frombuffer(data, np.int64, offset=_SHAPE.size)
    sizes = (*[num_tokens] * 3, *[num_sequences] * 3, num_sequences * num_blocks, num_calls)
    if sum(sizes) > numbers.size:
        raise broken
    *arrays, rest = np.split(numbers, np.cumsum(sizes))
    input_ids, positions, slots, query_lens, seq_lens, output_lens, table, num_rows = arrays
    if num_rows.min(initial=0) < 0 or num_rows.sum() != rest.size:
        raise broken
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        query_lens=query_lens,
        seq_lens=seq_lens,
        block_tables=torch.from_numpy(table.reshape(num_sequences, num_blocks)),
        output_lens=output_lens,
        logit_rows=tuple(np.split(rest, np.cumsum(num_rows)[:-1])) if num_calls else (),
    )
