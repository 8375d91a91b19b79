"""What proves whence KV came, and what the figures are."""

import socket
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from bench.tiers.counters import Counts, free_ports, parse, read_from_device
from bench.tiers.figures import Seen, figures, p90
from bench.tiers.ways import PREFIX_BLOCKS, PREFIX_TOKENS, WAYS, Asked
from kvstore.tiers.host import HostTier
from kvstore.tiers.metrics import TierCollector
from kvstore.tiers.stack import TierStack
from kvstore.transfer.journal import TransferJournal
from pdmesh.transfers import Direction, Outcome
from tests.tier_blocks import BLOCK_BYTES, block, empty_views, key, keys

ALL = PREFIX_BLOCKS * BLOCK_BYTES
FROM_HOST = Asked({"decode-0": Counts(host_hits=PREFIX_BLOCKS)}, PREFIX_TOKENS, "prefill-0", "")
FROM_DISK = Asked(
    {"prefill-0": Counts(disk_hits=PREFIX_BLOCKS, device_bytes=ALL)}, PREFIX_TOKENS, "prefill-0", "prefill-0"
)
FROM_STORE = Asked(
    {"store-0": Counts(host_hits=PREFIX_BLOCKS, sent_bytes=ALL), "prefill-1": Counts(received_bytes=ALL)},
    PREFIX_TOKENS, "prefill-0", "prefill-1",
)  # fmt: skip


def test_each_way_is_proven_by_its_own_evidence_alone() -> None:
    evidence = {"host": FROM_HOST, "disk": FROM_DISK, "store": FROM_STORE}
    for name, way in WAYS.items():
        # A store's blocks are read from its host memory, so they are that way's evidence too.
        proven = {other for other, asked in evidence.items() if way.proves(asked, BLOCK_BYTES)} - {"store"}
        assert proven == {name} - {"store"}
    assert WAYS["store"].proves(FROM_STORE, BLOCK_BYTES)


@pytest.mark.parametrize("name", WAYS)
def test_a_part_that_was_computed_disproves_it(name: str) -> None:
    asked = {"host": FROM_HOST, "disk": FROM_DISK, "store": FROM_STORE}[name]
    assert not WAYS[name].proves(replace(asked, cached_tokens=PREFIX_TOKENS - 16), BLOCK_BYTES)


@pytest.mark.parametrize(
    "given",
    [
        {"decode-0": Counts(host_hits=PREFIX_BLOCKS - 1)},
        {"decode-0": Counts()},
        {"decode-0": Counts(host_hits=PREFIX_BLOCKS, disk_hits=1)},
        {"decode-0": Counts(host_hits=PREFIX_BLOCKS), "prefill-0": Counts(host_hits=1)},
    ],
    ids=["a block less", "the cache", "disk as well", "another worker as well"],
)
def test_host_memory_must_have_given_all_of_it(given: dict[str, Counts]) -> None:
    assert not WAYS["host"].proves(replace(FROM_HOST, given=given), BLOCK_BYTES)


def test_what_lay_in_the_page_cache_did_not_come_from_disk() -> None:
    given = {"prefill-0": replace(FROM_DISK.given["prefill-0"], device_bytes=ALL - 1)}
    assert not WAYS["disk"].proves(replace(FROM_DISK, given=given), BLOCK_BYTES)


def test_the_system_says_what_came_from_a_device() -> None:
    assert read_from_device("rchar: 5000\nread_bytes: 4096\nwrite_bytes: 0\n") == 4096


@pytest.mark.parametrize(
    "change",
    [
        {"second_worker": "prefill-0"},
        {"given": {**FROM_STORE.given, "store-0": Counts(host_hits=PREFIX_BLOCKS)}},
        {"given": {**FROM_STORE.given, "prefill-1": Counts()}},
    ],
    ids=["the same worker", "the store sent nothing", "it did not arrive there"],
)
def test_a_store_must_have_sent_it_to_a_second_worker(change: dict[str, object]) -> None:
    assert not WAYS["store"].proves(replace(FROM_STORE, **change), BLOCK_BYTES)  # type: ignore[arg-type]


def test_counts_are_those_that_a_worker_serves() -> None:
    registry = CollectorRegistry()
    journal = TransferJournal(registry)
    tiers = TierStack(HostTier(4, BLOCK_BYTES))
    registry.register(TierCollector(tiers.stats))
    assert tiers.put(key(1), block(1))
    assert tiers.load(keys(1, 2), empty_views(2)) == 1
    journal.begin(Direction.SENDING, "r", "peer", "tcp", 1, 700).end(Outcome.DONE, 700, 1, 0.1)
    journal.begin(Direction.SENDING, "r", "peer", "shm", 1, 50).end(Outcome.DONE, 50, 1, 0.1)
    journal.begin(Direction.SENDING, "r", "peer", "tcp", 1, 900).end(Outcome.ABORTED, 900, 1, 0.1)
    journal.begin(Direction.RECEIVING, "r", "peer", "tcp", 1, 30).end(Outcome.DONE, 30, 1, 0.1)
    counts = parse(generate_latest(registry).decode())
    assert counts == Counts(host_hits=1, host_stored=1, sent_bytes=750, received_bytes=30)
    assert counts.since(Counts(host_hits=1, sent_bytes=50)) == Counts(host_stored=1, sent_bytes=700, received_bytes=30)


def test_ports_are_free_all_of_them() -> None:
    first = free_ports(5)
    for port in range(first, first + 5):
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_figures_are_medians_and_the_ratio_of_them() -> None:
    seen = Seen(computed_s=[1.0, 3.0, 2.0], brought_s=[0.5, 0.4, 9.0], num_unproven=2)
    result = figures(seen, wanted=0.25)
    assert result["computed_ms"] == {"p50": 2000.0, "p90": 3000.0, "num": 3}
    assert result["brought_ms"] == {"p50": 500.0, "p90": 9000.0, "num": 3}
    assert (result["ratio"], result["met"], result["num_unproven"]) == (0.25, True, 2)
    assert not figures(seen, wanted=0.24)["met"]


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (9, 9), (10, 9), (11, 10), (20, 18)])
def test_p90_is_a_value_that_was_seen(count: int, expected: int) -> None:
    assert p90(list(range(count, 0, -1))) == expected
