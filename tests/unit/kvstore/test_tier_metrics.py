"""What Prometheus reads of tiers."""

from dataclasses import fields

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvstore.tiers.base import TierStats
from kvstore.tiers.metrics import TierCollector

# In the order of TierStats' fields.
NAMES = (
    *("capacity_blocks", "blocks", "bytes", "hits_total", "misses_total", "stored_total", "evicted_total"),
    *("dropped_total", "corrupt_total", "read_seconds_total", "write_seconds_total"),
)


def test_every_number_of_every_tier_is_read_back() -> None:
    tiers = {
        "host": TierStats(1, 2, 3, 4, 5, 6, 7, 8, 9, 0.5, 0.25),
        "disk": TierStats(20, 21, 22, 23, 24, 25, 26, 27, 28, 2.5, 1.25),
    }
    registry = CollectorRegistry()
    registry.register(TierCollector(lambda: tiers))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    read = {(sample.name, sample.labels["tier"]): sample.value for family in families for sample in family.samples}
    assert read == {
        (f"pdmesh_kv_tier_{name}", tier): getattr(stats, field.name)
        for tier, stats in tiers.items()
        for name, field in zip(NAMES, fields(stats), strict=True)
    }


def test_tiers_are_asked_when_read_and_not_before() -> None:
    num_asked = 0

    def stats() -> dict[str, TierStats]:
        nonlocal num_asked
        num_asked += 1
        return {"host": TierStats(9, num_asked, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0)}

    registry = CollectorRegistry()
    registry.register(TierCollector(stats))
    assert num_asked == 0
    assert [registry.get_sample_value("pdmesh_kv_tier_blocks", {"tier": "host"}) for _ in range(2)] == [1, 2]
