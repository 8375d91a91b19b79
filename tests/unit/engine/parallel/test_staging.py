"""Staged KV: when a copy is said to be done, every rank of the node has made it."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from engine.kv_cache import KVCache
from engine.parallel.exchange import GroupDownError
from engine.parallel.staging import StagedMemory, copy_region
from engine.parallel.wire import Stage, Staged, Wire
from tests.fake_model import FAKE_CONFIG


class Device(KVCache):
    """A region that takes its time, and notes what it copies."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(
            FAKE_CONFIG, num_blocks=4, block_size=4, dtype=torch.float32, device=torch.device("cpu"), lend=True
        )
        self.copied: list[tuple[str, tuple[int, ...]]] = []
        self._delay_s = delay_s

    def to_host(self, block_ids: Sequence[int]) -> None:
        time.sleep(self._delay_s)
        self.copied.append(("to_host", tuple(block_ids)))

    def to_device(self, block_ids: Sequence[int]) -> None:
        time.sleep(self._delay_s)
        self.copied.append(("to_device", tuple(block_ids)))


@pytest.fixture
def devices() -> list[Device]:
    """The leader's, and two followers'."""
    return [Device(0.0), Device(0.02), Device(0.05)]


@pytest.fixture
def memory(devices: list[Device]) -> Iterator[StagedMemory]:
    pairs = [socket.socketpair() for _ in devices[1:]]

    def follow(wire: Wire, device: Device) -> None:
        while (message := wire.receive()) is not None:
            assert isinstance(message, Stage)
            copy_region(device, message)
            wire.send(Staged())

    threads = [
        threading.Thread(target=follow, args=(Wire(theirs, "rank 0"), device))
        for (_, theirs), device in zip(pairs, devices[1:], strict=True)
    ]
    for thread in threads:
        thread.start()
    yield StagedMemory(devices[0], [Wire(ours, f"rank {rank}") for rank, (ours, _) in enumerate(pairs, 1)])
    for ours, _ in pairs:
        ours.close()
    for thread in threads:
        thread.join()
    for _, theirs in pairs:
        theirs.close()


def test_every_rank_has_copied_when_it_returns(memory: StagedMemory, devices: list[Device]) -> None:
    memory.to_host([1, 3])
    assert [device.copied for device in devices] == [[("to_host", (1, 3))]] * 3
    memory.to_device([0])
    assert [device.copied[1:] for device in devices] == [[("to_device", (0,))]] * 3
    memory.to_host([])
    assert all(len(device.copied) == 2 for device in devices)


def test_threads_take_turns(memory: StagedMemory, devices: list[Device]) -> None:
    threads = [threading.Thread(target=memory.to_host, args=([block],)) for block in range(4) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert devices[0].copied == devices[1].copied == devices[2].copied
    assert len(devices[0].copied) == 20


def test_it_is_the_leaders_memory(memory: StagedMemory, devices: list[Device]) -> None:
    own = devices[0]
    assert (memory.block_bytes, memory.file, memory.place(2)) == (own.block_bytes, own.file, 2 * own.block_bytes)
    memory.view(2)[:4] = b"same"
    assert bytes(own.view(2)[:4]) == b"same"


def test_a_rank_that_is_gone() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(GroupDownError, match="rank 1"):
        StagedMemory(Device(0.0), [Wire(ours, "rank 1")]).to_host([1])
    ours.close()
