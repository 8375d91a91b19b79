"""What the journal keeps, how it names an end, and that it stays small and exact whoever calls it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry

from kvstore.transfer.journal import (
    MAX_ABORTED,
    MAX_CHOICES,
    MAX_FAILURES,
    MAX_FALLBACKS,
    MAX_LIVE,
    MAX_REASON_CHARACTERS,
    TransferEntry,
    TransferJournal,
    outcome_of,
)
from pdmesh.errors import (
    CancelledRequestError,
    CorruptionError,
    DeadlineError,
    PreconditionError,
    TicketError,
    UnavailableError,
)
from pdmesh.transfers import Direction, LiveTransfer, Outcome, TransferReport, TransferTotal, TransportChoice


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def journal(registry: CollectorRegistry, clock: Clock) -> TransferJournal:
    return TransferJournal(registry, clock)


def receiving(journal: TransferJournal, request_id: str = "r", transport: str = "tcp") -> TransferEntry:
    return journal.begin(Direction.RECEIVING, request_id, "prefill-0", transport, num_blocks=2, num_bytes=512)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"pdmesh_kv_{name}", labels)


def test_a_new_journal_is_empty(journal: TransferJournal) -> None:
    assert journal.report() == TransferReport()
    assert journal.transports_in_use() == ()


def test_a_transfer_is_live_until_it_ends(journal: TransferJournal, clock: Clock) -> None:
    entry = receiving(journal)
    entry.state = "reading"
    clock.now += 2.0
    assert journal.report(num_tickets=1, num_leases=3) == TransferReport(
        live=(LiveTransfer(Direction.RECEIVING, "r", "prefill-0", "tcp", "reading", 2, 512, 2.0),),
        num_live=1,
        num_tickets=1,
        num_leases=3,
    )
    entry.end(Outcome.DONE, num_bytes=512, num_parts=2, duration_s=1.5)
    assert journal.report() == TransferReport(totals=(TransferTotal(Direction.RECEIVING, "tcp", 1, 0, 0, 512, 2, 1.5),))


def test_only_the_first_end_counts(journal: TransferJournal, registry: CollectorRegistry) -> None:
    entry = receiving(journal)
    entry.end(Outcome.DONE, 512, 1, 0.1)
    entry.end(Outcome.ABORTED, 0, 0, 0.2)
    entry.first_byte()
    (total,) = journal.report().totals
    assert (total.num_done, total.num_failed, journal.num_live) == (1, 0, 0)
    assert value(registry, "transfers_live", direction="receiving") == 0
    assert value(registry, "transfer_queue_seconds_count", transport="tcp", direction="receiving") is None


def test_failures_tell_what_happened_latest_first(journal: TransferJournal, clock: Clock) -> None:
    receiving(journal, "first").fail(UnavailableError("gone", reason="SENDER_LOST"), 128, 1, 0.1)
    clock.now += 5.0
    receiving(journal, "second").fail(OSError("no route"), 0, 0, 0.1)
    latest, earliest = journal.report().failures
    assert (latest.request_id, latest.reason, latest.age_s) == ("second", "OSError('no route')", 0.0)
    assert (earliest.request_id, earliest.reason, earliest.age_s) == ("first", "SENDER_LOST: gone", 5.0)
    assert (earliest.outcome, earliest.num_bytes) == (Outcome.LOST, 128)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (UnavailableError("", reason="SENDER_LOST"), Outcome.LOST),
        (UnavailableError("", reason="RECEIVER_LOST"), Outcome.LOST),
        (ConnectionResetError(), Outcome.LOST),
        (UnavailableError("", reason="TRANSFER_ABORTED"), Outcome.ABORTED),
        (CancelledRequestError(""), Outcome.ABORTED),
        (DeadlineError(""), Outcome.ABORTED),
        (asyncio.CancelledError(), Outcome.ABORTED),
        (TicketError("", reason="TICKET_EPOCH"), Outcome.REFUSED),
        (PreconditionError("", reason="TICKET_REVOKED"), Outcome.REFUSED),
        (CorruptionError(""), Outcome.CORRUPTED),
        (CorruptionError("", reason="KV_INCOMPLETE"), Outcome.CORRUPTED),
        (TicketError("", reason="LEASE_EXPIRED"), Outcome.LEASE_EXPIRED),
        (UnavailableError("", reason="LEASE_EXPIRED"), Outcome.LEASE_EXPIRED),
    ],
    ids=lambda case: getattr(case, "reason", None) or str(case),
)
def test_an_error_names_the_end(error: BaseException, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome


def test_bounds_hold_and_counts_go_on(journal: TransferJournal) -> None:
    entries = [receiving(journal, str(number)) for number in range(MAX_LIVE + 5)]
    report = journal.report()
    assert (len(report.live), report.num_live) == (MAX_LIVE, MAX_LIVE + 5)
    assert report.live[0].request_id == "0"
    for entry in entries:
        entry.end(Outcome.LOST, 0, 0, 0.0, reason="x" * 10_000)
    report = journal.report()
    assert (report.live, report.num_live, report.totals[0].num_failed) == ((), 0, MAX_LIVE + 5)
    assert len(report.failures) == MAX_FAILURES
    assert report.failures[0].request_id == str(MAX_LIVE + 4)
    assert len(report.failures[0].reason) == MAX_REASON_CHARACTERS


def test_clients_that_leave_do_not_push_failures_out(journal: TransferJournal, clock: Clock) -> None:
    receiving(journal, "lost").end(Outcome.LOST, 0, 0, 0.0)
    for number in range(2 * MAX_FAILURES):
        clock.now += 1.0
        receiving(journal, str(number)).end(Outcome.ABORTED, 0, 0, 0.0)
    clock.now += 1.0
    receiving(journal, "refused").end(Outcome.REFUSED, 0, 0, 0.0)
    report = journal.report()
    assert [failure.request_id for failure in report.failures[:2]] == ["refused", str(2 * MAX_FAILURES - 1)]
    assert report.failures[-1].request_id == "lost"
    assert len(report.failures) == 2 + MAX_ABORTED
    (total,) = report.totals
    assert (total.num_done, total.num_aborted, total.num_failed) == (0, 2 * MAX_FAILURES, 2)


def test_the_last_choice_for_each_peer_is_kept(journal: TransferJournal, clock: Clock) -> None:
    journal.note_choice("a", "grpc", "shm: other host; tcp: refused")
    journal.note_choice("b", "tcp", "")
    clock.now += 1.0
    journal.note_choice("a", "shm", "")
    assert journal.report().choices == (TransportChoice("a", "shm", "", 0.0), TransportChoice("b", "tcp", "", 1.0))
    assert journal.transports_in_use() == ("shm", "tcp")
    for number in range(MAX_CHOICES):
        journal.note_choice(f"peer {number}", "grpc", "")
    assert len(journal.report().choices) == MAX_CHOICES
    assert journal.transports_in_use() == ("grpc",)


def test_fallbacks_are_counted_and_their_reasons_stay_few(
    journal: TransferJournal, registry: CollectorRegistry
) -> None:
    for number in range(MAX_FALLBACKS + 3):
        journal.note_fallback("tcp", "grpc", f"REASON_{number}")
    journal.note_fallback("tcp", "grpc", "REASON_0")
    fallbacks = {fallback.reason: fallback.count for fallback in journal.report().fallbacks}
    assert len(fallbacks) == MAX_FALLBACKS + 1
    assert (fallbacks["REASON_0"], fallbacks["OTHER"]) == (2, 3)
    labels = {"from": "tcp", "to": "grpc"}
    assert value(registry, "transfer_fallbacks_total", reason="REASON_0", **labels) == 2
    assert value(registry, "transfer_fallbacks_total", reason="OTHER", **labels) == 3


def test_metrics_of_an_end(journal: TransferJournal, registry: CollectorRegistry, clock: Clock) -> None:
    entry = receiving(journal)
    clock.now += 0.25
    entry.first_byte()
    clock.now += 9.0
    entry.first_byte()
    entry.end(Outcome.DONE, 512, 2, duration_s=0.5)
    done = {"transport": "tcp", "direction": "receiving", "outcome": "done"}
    assert value(registry, "transfers_total", **done) == 1
    assert value(registry, "transfer_bytes_total", **done) == 512
    assert value(registry, "transfer_seconds_sum", **done) == 0.5
    assert value(registry, "transfer_queue_seconds_sum", transport="tcp", direction="receiving") == 0.25


@pytest.mark.parametrize(
    ("outcome", "metric"), [(Outcome.REFUSED, "fenced_writes_total"), (Outcome.CORRUPTED, "checksum_failures_total")]
)
def test_what_was_found_out_here_is_not_counted_again_by_the_sender(
    journal: TransferJournal, registry: CollectorRegistry, outcome: Outcome, metric: str
) -> None:
    journal.begin(Direction.SENDING, "r", "d", "shm", 1, 1).end(outcome, 0, 0, 0.0)
    assert value(registry, metric, transport="shm") is None
    receiving(journal, transport="shm").end(outcome, 0, 0, 0.0)
    assert value(registry, metric, transport="shm") == 1


def test_what_has_no_entry_is_counted_too(journal: TransferJournal, registry: CollectorRegistry) -> None:
    journal.note_fenced_write("tcp")
    assert value(registry, "fenced_writes_total", transport="tcp") == 1
    receiving(journal).end(Outcome.LEASE_EXPIRED, 0, 0, 0.0)
    assert value(registry, "lease_expiries_total", direction="receiving") == 1


def test_threads_lose_no_count(journal: TransferJournal, registry: CollectorRegistry) -> None:
    num_threads, each = 8, 200

    def work(thread: int) -> None:
        for number in range(each):
            entry = receiving(journal, f"{thread}/{number}")
            journal.note_choice(f"{thread}/{number}", "tcp", "")
            journal.note_fallback("shm", "tcp", "OTHER_HOST")
            entry.first_byte()
            entry.end(Outcome.DONE if number % 2 else Outcome.LOST, 10, 1, 0.0)
            journal.report()

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_threads)))
    report = journal.report()
    (total,) = report.totals
    count = num_threads * each
    assert (report.num_live, report.live) == (0, ())
    assert (total.num_done, total.num_failed, total.num_bytes) == (count // 2, count // 2, 5 * count)
    assert report.fallbacks[0].count == count
    assert value(registry, "transfers_live", direction="receiving") == 0
    assert value(registry, "transfer_queue_seconds_count", transport="tcp", direction="receiving") == count
