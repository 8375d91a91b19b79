"""What Prometheus reads of tiers."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvstore.tiers.base import TierStats
from kvstore.tiers.metrics import TierCollector


def test_every_number_of_every_tier_is_read_back() -> None:
    tiers = [TierStats("host", 1, 2, 3, 4, 5, 6, 7, 8, 0.5), TierStats("disk", 10, 11, 12, 13, 14, 15, 16, 17, 2.5)]
    registry = CollectorRegistry()
    registry.register(TierCollector(lambda: tiers))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    read = {(sample.name, sample.labels["tier"]): sample.value for family in families for sample in family.samples}
    names = ["blocks", "bytes", "hits_total", "misses_total", "stored_total", "evicted_total", "dropped_total"]
    names += ["corrupt_total", "load_seconds_total"]
    expected = {("host", name): number for name, number in zip(names, [*range(1, 9), 0.5], strict=True)}
    expected |= {("disk", name): number for name, number in zip(names, [*range(10, 18), 2.5], strict=True)}
    assert read == {(f"pdmesh_kv_tier_{name}", tier): number for (tier, name), number in expected.items()}


def test_tiers_are_asked_when_read_and_not_before() -> None:
    num_asked = 0

    def stats() -> list[TierStats]:
        nonlocal num_asked
        num_asked += 1
        return [TierStats("host", num_asked, 0, 0, 0, 0, 0, 0, 0, 0.0)]

    registry = CollectorRegistry()
    registry.register(TierCollector(stats))
    assert num_asked == 0
    assert [registry.get_sample_value("pdmesh_kv_tier_blocks", {"tier": "host"}) for _ in range(2)] == [1, 2]
