"""The numbers of a process's KV transfers, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pdmesh.transfers import Direction, Outcome

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class TransferMetrics:
    """Owns its time series in `registry`; one per registry. Safe to call from any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        each = ("transport", "direction", "outcome")
        self.transfers = Counter("pdmesh_kv_transfers", "KV transfers that ended.", each, registry=registry)
        self.bytes = Counter(
            "pdmesh_kv_transfer_bytes", "Bytes that they moved, whatever their end.", each, registry=registry
        )
        self.seconds = Histogram(
            "pdmesh_kv_transfer_seconds", "How long they took.", each, buckets=_SECONDS, registry=registry
        )
        self.queue_seconds = Histogram(
            "pdmesh_kv_transfer_queue_seconds",
            "From a transfer's begin, on a receiver its grant, to its first byte.",
            ("transport", "direction"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.live = Gauge("pdmesh_kv_transfers_live", "Begun and not ended.", ("direction",), registry=registry)
        self.fallbacks = Counter(
            "pdmesh_kv_transfer_fallbacks",
            "Times that a transport gave way to the next one.",
            ("from", "to", "reason"),
            registry=registry,
        )
        self.fenced_writes = Counter(
            "pdmesh_kv_fenced_writes", "Writes refused here for want of a valid ticket.", ("transport",),
            registry=registry,
        )  # fmt: skip
        self.checksum_failures = Counter(
            "pdmesh_kv_checksum_failures", "Transfers ended here by bytes that failed their checksum or shape.",
            ("transport",), registry=registry,
        )  # fmt: skip
        self.lease_expiries = Counter(
            "pdmesh_kv_lease_expiries", "Transfers ended by a lease that ran out.", ("direction",), registry=registry
        )

    def count_end(
        self, transport: str, direction: Direction, outcome: Outcome, num_bytes: int, duration_s: float
    ) -> None:
        """A transfer has ended; `num_bytes` were moved until then.

        What the sender of a refused or corrupted transfer hears was counted where it was found out, on the other side.
        """
        labels = (transport, direction.value, outcome.value)
        self.transfers.labels(*labels).inc()
        self.bytes.labels(*labels).inc(num_bytes)
        self.seconds.labels(*labels).observe(duration_s)
        self.live.labels(direction.value).dec()
        if outcome is Outcome.LEASE_EXPIRED:
            self.lease_expiries.labels(direction.value).inc()
        elif outcome is Outcome.REFUSED and direction is not Direction.SENDING:
            self.fenced_writes.labels(transport).inc()
        elif outcome is Outcome.CORRUPTED and direction is not Direction.SENDING:
            self.checksum_failures.labels(transport).inc()
